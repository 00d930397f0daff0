"""A training recipe: a TOML file, validated; training/recipes/ has one of each kind, docs/training.md all keys.

recipe = load_recipe(Path("training/recipes/muge.toml"), ["optim.lr=1e-5", "run.seed=1"])
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tuwen.errors import InvalidInput
from tuwen.specs import CONTEXT_LENGTH, ModelSpec, get_spec

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# Source: the published fine-tuning uses 3e-6 (the notebook) to 5e-5 (run_scripts/), pre-training 5e-4.
MAX_FINE_TUNING_LR = 1e-4


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(Section):
    architecture: str
    # Where the weights begin: a checkpoint of any format this project reads; or each tower's own; or at random.
    init_checkpoint: Path | None = None
    init_vision: Path | None = None  # OpenAI CLIP's visual.*, as state dict in .pt or .safetensors
    init_text: Path | None = None  # a BERT, as pytorch_model.bin or model.safetensors
    freeze_vision: bool = False
    freeze_text: bool = False
    # FLIP: the share of a picture's patches that is left out at each step (arXiv 2212.00794); for ViTs.
    mask_ratio: float = Field(0.0, ge=0, lt=1)

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            return get_spec(name).name
        except InvalidInput as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.init_checkpoint and (self.init_vision or self.init_text):
            raise ValueError("init_checkpoint has both towers: give it alone, or init_vision and init_text")
        if self.mask_ratio and self.spec.vision.kind != "vit":
            raise ValueError(f"mask_ratio leaves out patches, and {self.architecture} has none")
        return self

    @property
    def spec(self) -> ModelSpec:
        return get_spec(self.architecture)


class Source(Section):
    """One of several sets of pairs.

    weight: how often each of its items is seen in an epoch; 0.5 sees half of them, others in the next.
    """

    path: Path
    weight: float = Field(1.0, gt=0)


class DataSection(Section):
    # One of these three: an LMDB or TSV and JSONL; several of them; shards, read as a stream (a glob of *.tsv).
    path: Path | None = None
    sources: tuple[Source, ...] = ()
    shards: str | None = None
    train_split: str = "train"
    # An item of the order: a picture, with some of its captions; or a pair, each caption with its picture.
    unit: Literal["image", "pair"] = "image"
    # Captions drawn per picture and step; all of one picture's captions are its positives.
    captions_per_image: int = Field(1, ge=1)
    # Keep pictures out of a batch that share a caption with one in it; they come later in the epoch.
    distinct_captions: bool = False
    # How often a caption is joined with another of the same picture, as people put words together in a query; it
    # then describes only the pictures that both describe.
    join_captions: Fraction = 0.0
    # How often each token of a longer caption is left out.
    drop_tokens: Beta = 0.0
    context_length: int = Field(CONTEXT_LENGTH, ge=3)
    # Keep every decoded picture in memory (R x R x 3 bytes each): for small sets, where decoding would repeat.
    cache_decoded: bool = False
    # Processes that read, decode and augment; 0 does it between the steps.
    num_workers: int = Field(0, ge=0)
    # Batches each of them holds ready, which bounds memory.
    prefetch_batches: int = Field(2, ge=1)
    # Unreadable pictures that are skipped, in a process of the run; one more ends it.
    max_corrupt: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("path", "sources", "shards") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give one of path, sources and shards; got {', '.join(given) or 'none'}")
        if self.unit == "pair" and self.captions_per_image > 1:
            raise ValueError('captions_per_image is for unit = "image": a pair has one caption')
        if self.shards and self.unit != "pair":
            raise ValueError('shards hold pairs: set unit = "pair"')
        return self

    @property
    def all_sources(self) -> tuple[Source, ...]:
        return self.sources or ((Source(path=self.path),) if self.path else ())


class OptimSection(Section):
    """None: what is published for the architecture, see `RATES`."""

    epochs: int | None = Field(None, ge=1)
    max_steps: int | None = Field(None, ge=1)
    # Pictures (or pairs) a step, of all processes together.
    batch_size: int = Field(ge=2)
    # Of those, how many a process computes at a time; the loss is exact all the same. 0: all of its own.
    chunk_size: int = Field(0, ge=0)
    lr: float | None = Field(None, gt=0)
    betas: tuple[Beta, Beta] | None = None
    eps: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.2, ge=0)
    warmup_steps: int = Field(500, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float = Field(1.0, gt=0)
    # Each layer's rate is that of the one above times this; 1 is the same for all.
    layer_decay: float = Field(1.0, gt=0, le=1)
    # Of an exponential moving average of the weights, which is what is validated and saved; 0 is off.
    ema_decay: Beta = 0.0

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs or max_steps")
        if self.chunk_size > self.batch_size:
            raise ValueError(f"chunk_size {self.chunk_size} is above batch_size {self.batch_size}")
        return self


class LossSection(Section):
    """`contrastive` is CLIP's, `sigmoid` SigLIP's (arXiv 2303.15343), whose bias is learned beside logit_scale."""

    kind: Literal["contrastive", "sigmoid"] = "contrastive"
    # Contrast with the batches of all processes; false: each with its own alone.
    aggregate: bool = True
    # Each process computes the rows of its own items; false: the whole matrix.
    local_loss: bool = True
    # Let gradients flow back to the processes that features came from. With local_loss they are exact only so.
    gather_with_grad: bool = True


class AugmentSection(Section):
    """Random changes to a training picture; 0 turns one off. Nothing mirrors: 左 and 右 are different captions."""

    # The share of the picture's area that a crop keeps, from .. to, of an aspect ratio between 3/4 and 4/3.
    crop_area: tuple[float, float] = (1.0, 1.0)
    # RandAugment (arXiv 1909.13719) without mirroring: so many changes drawn a picture, of strength 0 to 10.
    rand_augment_changes: int = Field(0, ge=0, le=10)
    rand_augment_strength: float = Field(9.0, ge=0, le=10)
    rotate_degrees: float = Field(0.0, ge=0, le=180)
    min_scale: float = Field(1.0, gt=0)
    max_scale: float = Field(1.0, gt=0)
    stretch: float = Field(0.0, ge=0, lt=1)
    shear: float = Field(0.0, ge=0, lt=1)
    translate: float = Field(0.0, ge=0, lt=1)
    brightness: float = Field(0.0, ge=0, lt=1)
    contrast: float = Field(0.0, ge=0, lt=1)
    saturation: float = Field(0.0, ge=0)
    hue_degrees: float = Field(0.0, ge=0, le=180)
    grayscale: Fraction = 0.0
    blur: Fraction = 0.0
    erase: Fraction = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} is above max_scale {self.max_scale}")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            raise ValueError(f"crop_area is {list(self.crop_area)}, expected [from, to] within 0 to 1")
        return self


class EngineSection(Section):
    device: str | None = None  # None: cuda where there is one
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # ddp: a copy of the weights each; fsdp: a share each (FSDP2), for models that do not fit otherwise.
    strategy: Literal["ddp", "fsdp"] = "ddp"
    grad_checkpointing: bool = False
    compile: bool = False
    sync_batch_norm: bool = False


class DistillSection(Section):
    """A student learns from a teacher: any checkpoint this project reads."""

    teacher: Path | None = None
    # What `tuwen teacher-features` wrote, instead of computing them at each step.
    features: Path | None = None
    # Of 1 - cosine between the teacher's embeddings and the student's, through a learned map where widths differ.
    feature_weight: float = Field(0.0, ge=0)
    # Of the divergence between the rows of the teacher's logits and the student's.
    logit_weight: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.teacher and self.features:
            raise ValueError("give teacher or features, not both")
        if bool(self.teacher or self.features) != bool(self.feature_weight or self.logit_weight):
            raise ValueError("give a teacher (or its features) and feature_weight or logit_weight, or neither")
        return self

    @property
    def is_on(self) -> bool:
        return bool(self.teacher or self.features)


class ValidSection(Section):
    """Recall on held-out pairs, and optionally zero-shot accuracy, while training."""

    path: Path | None = None  # None: the training data's
    split: str = "valid"  # "": no validation
    every_epochs: int = Field(1, ge=0)  # 0: not by epochs; so for all of these
    every_steps: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1)
    # ImageNet-style: a folder a class, and label_cn.txt, a line a class in the folders' order.
    zero_shot: Path | None = None


class RunSection(Section):
    out: Path
    seed: int = 0
    log_every_steps: int = Field(10, ge=1)
    save_every_epochs: int = Field(1, ge=0)
    save_every_steps: int = Field(0, ge=0)
    # Of the states to resume from, the newest so many are kept.
    keep_last: int = Field(2, ge=1)
    # The result is the checkpoint of the best validation, not the last one.
    keep_best: bool = False
    report_batch_accuracy: bool = False
    tensorboard: bool = False
    wandb_project: str | None = None
    # Tell the log which pictures each batch has.
    debug: bool = False


class Recipe(Section):
    model: ModelSection
    data: DataSection
    optim: OptimSection
    loss: LossSection = LossSection()
    augment: AugmentSection = AugmentSection()
    engine: EngineSection = EngineSection()
    distill: DistillSection = DistillSection()
    valid: ValidSection = ValidSection()
    run: RunSection

    @model_validator(mode="after")
    def _fits(self) -> Self:
        positions = self.model.spec.text.max_positions
        if self.data.context_length > positions:
            raise ValueError(
                f"data.context_length is {self.data.context_length}, "
                f"{self.model.architecture} has {positions} positions"
            )
        if self.valid.split and not (self.valid.path or self.data.path):
            raise ValueError('valid.path: name the validation pairs, or do without: valid.split = ""')
        return self

    @property
    def valid_path(self) -> Path | None:
        """Where the validation pairs lie; None without validation."""
        return (self.valid.path or self.data.path) if self.valid.split else None

    @property
    def lr(self) -> float:
        return self.optim.lr or _rates(self.model.architecture).lr

    @property
    def betas(self) -> tuple[float, float]:
        return self.optim.betas or _rates(self.model.architecture).betas

    @property
    def eps(self) -> float:
        return self.optim.eps or _rates(self.model.architecture).eps

    @property
    def warnings(self) -> list[str]:
        """What is allowed and seldom meant."""
        found = []
        if (
            self.model.init_checkpoint
            and self.lr > MAX_FINE_TUNING_LR
            and not self.model.architecture.startswith("Tiny")
        ):
            found.append(
                f"optim.lr is {self.lr:g} for weights that are trained already: above {MAX_FINE_TUNING_LR:g} "
                "fine-tuning undoes what they know (the published scripts use 3e-6 to 5e-5)"
            )
        if self.loss.aggregate and self.loss.local_loss and not self.loss.gather_with_grad:
            found.append("loss.local_loss without gather_with_grad: with several processes the gradient is not exact")
        return found


class Rates(Section):
    lr: float
    betas: tuple[float, float]
    eps: float


# Source: Chinese-CLIP's cn_clip/training/params.py, from CLIP's paper.
_RATES_OF_VIT = Rates(lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
RATES = {
    "RN50": Rates(lr=5e-4, betas=(0.9, 0.999), eps=1e-8),
    "ViT-L-14": Rates(lr=4e-4, betas=(0.9, 0.98), eps=1e-6),
    "ViT-L-14-336": Rates(lr=4e-4, betas=(0.9, 0.98), eps=1e-6),
}


def _rates(architecture: str) -> Rates:
    return RATES.get(architecture, _RATES_OF_VIT)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        overrides: `section.key=value` each, the value as in TOML; bare words are taken as strings, none as no value.
    Raises:
        InvalidInput: the file cannot be read, is no TOML, or a key or value is wrong; one sentence names the first.
    """
    values = _read_toml(path)
    for override in overrides:
        _apply(override, values)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            message = f"unknown key{_known_keys(first['loc'])}"
        else:
            message = first["msg"].removeprefix("Value error, ")
        raise InvalidInput(f"{path}: {key + ': ' if key else ''}{message}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise InvalidInput(f"{path}: there is no such recipe") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not valid TOML: {error}") from None


def _apply(override: str, values: dict[str, Any]) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or not dot or not name or "." in name:
        raise InvalidInput(f"--set {override}: expected section.key=value, as optim.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text.strip() == "none" else text.strip()  # TOML has no word for it
    if not isinstance(values.setdefault(section, {}), dict):
        raise InvalidInput(f"--set {override}: {section} is not a section")
    values[section][name] = value


def _known_keys(where: tuple[int | str, ...]) -> str:
    """What may stand there instead, for a sentence."""
    kind: Any = Recipe
    for part in where[:-1]:
        kind = kind.model_fields[part].annotation if isinstance(part, str) and part in kind.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            return ""
    return f"; known are {', '.join(kind.model_fields)}"
