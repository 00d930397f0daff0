"""Every architecture's numbers, as one table of frozen dataclasses.

The single source for the towers, the builders and the rendered server configs. The numbers of the five
published architectures are those of Chinese-CLIP (paper arXiv 2211.01335, table 7, and the model_configs of
its repository); the `Tiny` family is ours, for tests and the demo.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tuwen.errors import InvalidInput

PAD_ID, UNK_ID, CLS_ID, SEP_ID = 0, 100, 101, 102
VOCAB_SIZE = 21128
CONTEXT_LENGTH = 52

# Channel statistics of CLIP's training images; source: openai/CLIP clip.py, kept by Chinese-CLIP.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionSpec:
    """The image tower: a ViT ("vit": `layers` blocks) or CLIP's modified ResNet ("resnet": blocks per stage)."""

    kind: Literal["vit", "resnet"]
    resolution: int
    layers: int | tuple[int, int, int, int]
    width: int
    patch_size: int | None = None
    head_width: int = 64

    def __post_init__(self) -> None:
        if (self.kind == "vit") != isinstance(self.layers, int) or (self.kind == "vit") != (
            self.patch_size is not None
        ):
            raise InvalidInput(
                f"vision: a vit has an integer `layers` and a `patch_size`, a resnet neither; got {self}"
            )
        if self.resolution % self.downscale:
            raise InvalidInput(f"vision: resolution {self.resolution} is not a multiple of {self.downscale}")

    @property
    def downscale(self) -> int:
        """Pixels per step of the final feature grid, along one side."""
        return self.patch_size if self.patch_size is not None else 32

    @property
    def grid_size(self) -> int:
        return self.resolution // self.downscale

    @property
    def num_heads(self) -> int:
        features = self.width if self.kind == "vit" else self.width * 32
        return features // self.head_width


@dataclass(frozen=True)
class TextSpec:
    """The text tower: BERT as in RoBERTa-wwm-ext; GELU, LayerNorm eps 1e-12, no pooler."""

    layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int = VOCAB_SIZE
    max_positions: int = 512
    type_vocab_size: int = 2
    dropout: float = 0.1


@dataclass(frozen=True)
class ModelSpec:
    """One architecture: two towers and the space they meet in."""

    name: str
    embed_dim: int
    vision: VisionSpec
    text: TextSpec
    context_length: int = CONTEXT_LENGTH

    @property
    def slug(self) -> str:
        """The name as models are served under it: ViT-B-16 -> vit_b_16."""
        return slugify(self.name)

    def with_resolution(self, resolution: int) -> ModelSpec:
        return replace(self, vision=replace(self.vision, resolution=resolution))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """Read back what `to_dict` wrote (through JSON too).

        Raises:
            InvalidInput: a key is missing, unknown or of the wrong type.
        """
        try:
            vision, text = dict(values["vision"]), dict(values["text"])
            if isinstance(vision["layers"], list):
                vision["layers"] = tuple(vision["layers"])
            rest = {key: value for key, value in values.items() if key not in ("vision", "text")}
            return cls(vision=VisionSpec(**vision), text=TextSpec(**text), **rest)
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"architecture description: {error}") from error


def slugify(name: str) -> str:
    """Lower case, everything but letters and digits to one underscore.

    Raises:
        InvalidInput: nothing is left, or the first character is no letter (Triton model names come from this).
    """
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug):
        raise InvalidInput(f"model name {name!r}: expected letters, digits and dashes, a letter first")
    return slug


_BASE_TEXT = TextSpec(layers=12, hidden_size=768, num_heads=12, intermediate_size=3072)
_RBT3_TEXT = TextSpec(layers=3, hidden_size=768, num_heads=12, intermediate_size=3072)
_LARGE_TEXT = TextSpec(layers=24, hidden_size=1024, num_heads=16, intermediate_size=4096)
# Nine tenths of the tiny text tower's weights are its 21128 word embeddings, so the hidden size is kept small.
_TINY_TEXT = TextSpec(layers=2, hidden_size=96, num_heads=4, intermediate_size=384, max_positions=64, dropout=0.0)
_HALF_TEXT = replace(_TINY_TEXT, hidden_size=64, intermediate_size=256)

_VIT_L = VisionSpec("vit", resolution=224, layers=24, width=1024, patch_size=14)

SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("RN50", 1024, VisionSpec("resnet", 224, (3, 4, 6, 3), 64), _RBT3_TEXT),
        ModelSpec("ViT-B-16", 512, VisionSpec("vit", 224, 12, 768, 16), _BASE_TEXT),
        ModelSpec("ViT-L-14", 768, _VIT_L, _BASE_TEXT),
        ModelSpec("ViT-L-14-336", 768, replace(_VIT_L, resolution=336), _BASE_TEXT),
        ModelSpec("ViT-H-14", 1024, VisionSpec("vit", 224, 32, 1280, 14, head_width=80), _LARGE_TEXT),
        ModelSpec("Tiny-RN", 128, VisionSpec("resnet", 64, (1, 2, 3, 2), 16, head_width=32), _TINY_TEXT),
        # A student for Tiny-RN: 1.9 million parameters to its 4.1, and as wide an embedding.
        ModelSpec("Tiny-RN-half", 128, VisionSpec("resnet", 64, (1, 2, 3, 2), 8, head_width=32), _HALF_TEXT),
        ModelSpec("Tiny-ViT", 128, VisionSpec("vit", 64, 4, 128, 8, head_width=32), _TINY_TEXT),
    )
}


def get_spec(name: str) -> ModelSpec:
    """The architecture of that name, or of that slug.

    Raises:
        InvalidInput: there is none; the message lists those there are.
    """
    for spec in SPECS.values():
        if name in (spec.name, spec.slug):
            return spec
    raise InvalidInput(f"architecture {name!r} is unknown; known are {', '.join(SPECS)}")
