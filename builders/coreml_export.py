"""Checkpoint -> what an iOS developer drags into Xcode: two Core ML packages, the vocabulary, and a card for the app.

    tuwen export coreml --checkpoint samples/emoji_tiny --out dist/ios

    dist/ios/tiny_rn_image.mlpackage   image, R x R RGB -> image_embeds float32 (1, D), unit length
    dist/ios/tiny_rn_text.mlpackage    input_ids int32 (1, L), L one of text_buckets -> text_embeds float32 (1, D)
    dist/ios/vocab.txt, model.json

Several precisions at once make a folder of each: dist/ios/fp16, dist/ios/palette8.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from builders.coreml_card import CARD_NAME, Card, Tokens, TowerCard, write_card
from builders.coreml_parity import BOUNDS, Item, Parity, measure_parity, parity_items
from builders.coreml_towers import (
    INPUT_NAMES,
    OUTPUT_NAMES,
    Precision,
    compress_tower,
    convert_tower,
    discard,
    import_coremltools,
    save_tower,
    text_buckets,
    trace_tower,
)
from builders.mil_evaluator import load_package
from builders.towers import TOWERS, ExportFailed, TowerKind
from tuwen.checkpoint import load_checkpoint
from tuwen.errors import InvalidInput
from tuwen.files import replace_folder
from tuwen.fingerprint import model_fingerprint
from tuwen.hub import PUBLISHED, download
from tuwen.model import ChineseCLIP
from tuwen.specs import slugify
from tuwen.tokenizer import VOCAB_PATH

MINIMUM_IOS = (16, 17, 18)
_CALIBRATION = (
    "Cosines of this model are comparable with one another only. Labels of one picture: softmax of exp(logit_scale) "
    "times the cosines. A threshold for one picture and one text is fitted on pairs of your own: `tuwen calibrate`."
)

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What is to be exported, but for the weights.

    Attributes:
        name: of the packages; by default the architecture's slug.
        minimum_ios: of the packages; what is older cannot load them.
        num_real: pictures and captions the gate looks at, beside random input.
    """

    precisions: tuple[Precision, ...] = ("fp16",)
    minimum_ios: int = 16
    name: str | None = None
    version: int = 1
    author: str = "Tuwen"
    licence: str | None = None
    num_real: int = 16

    def __post_init__(self) -> None:
        """Raises InvalidInput."""
        known = get_args(Precision)
        if not self.precisions or not set(self.precisions) <= set(known):
            raise InvalidInput(f"precision {', '.join(self.precisions) or 'none'}: expected some of {', '.join(known)}")
        if self.minimum_ios not in MINIMUM_IOS:
            raise InvalidInput(f"target iOS {self.minimum_ios}: expected one of {', '.join(map(str, MINIMUM_IOS))}")
        if self.version < 1:
            raise InvalidInput(f"version {self.version}: expected 1 or more")


@dataclass(frozen=True)
class ExportedTower:
    """One package, and what was measured of it.

    Attributes:
        operations: kind -> how often it occurs in the program.
    """

    path: Path
    size_bytes: int
    parity: Parity
    operations: dict[str, int]


@dataclass(frozen=True)
class ExportResult:
    """What stands in `out` now."""

    out: Path
    name: str
    fingerprint: int
    towers: dict[Precision, dict[TowerKind, ExportedTower]]


def export_coreml(
    checkpoint: Path, out: Path, request: Request | None = None, on_stage: OnStage = lambda stage: None
) -> ExportResult:
    """Convert, check and place both towers; `out` is replaced whole, or not touched.

    Args:
        checkpoint: a checkpoint folder, an official `.pt`, or a published name, which is downloaded.
        on_stage: hears what is going on, a short phrase each time.
    Raises:
        MissingDependency: coremltools is not installed.
        InvalidInput: the checkpoint cannot be read, or `out` holds something else than an export.
        ExportFailed: a tower cannot be converted, or its package does not compute what PyTorch computes.
    """
    import_coremltools()
    check_replaceable(out)
    on_stage("reading the checkpoint")
    if not checkpoint.exists() and str(checkpoint) in PUBLISHED:
        checkpoint = download(str(checkpoint), Path("~/.cache/clip").expanduser())
    return export_model(load_checkpoint(checkpoint), checkpoint.name, out, request or Request(), on_stage)


def export_model(
    model: ChineseCLIP, checkpoint_name: str, out: Path, request: Request, on_stage: OnStage = lambda stage: None
) -> ExportResult:
    """As `export_coreml`, of a model that is loaded."""
    check_replaceable(out)
    exporter = _Exporter(model, checkpoint_name, request, on_stage)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".coreml-", dir=out.parent) as staging_name:
        staging = Path(staging_name) / "export"
        staging.mkdir()
        towers: dict[Precision, dict[TowerKind, ExportedTower]] = {one: {} for one in request.precisions}
        for kind in TOWERS:
            for precision, tower in exporter.export_tower(kind, staging).items():
                towers[precision][kind] = tower
        for precision, both in towers.items():
            folder = exporter.folder(precision)
            shutil.copyfile(VOCAB_PATH, staging / folder / VOCAB_PATH.name)
            write_card(exporter.card(precision, both), staging / folder / CARD_NAME)
        on_stage("placing")
        replace_folder(staging, out)
    return ExportResult(out, exporter.name, exporter.fingerprint, towers)


def check_replaceable(out: Path) -> None:
    """An export replaces its folder whole: one that holds anything else is not ours to replace.

    Raises:
        InvalidInput: it is a file, or a folder of other things.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InvalidInput(f"{out}: is a file, expected a folder to write")
    for each in out.iterdir():
        is_precision = each.name in BOUNDS and (each / CARD_NAME).is_file()
        is_ours = each.name in (CARD_NAME, VOCAB_PATH.name, ".DS_Store") or each.suffix == ".mlpackage"
        if not is_precision and not is_ours:
            raise InvalidInput(f"{out}: holds {each.name}, which is of no export and would be lost; name a new folder")


class _Exporter:
    """One model on its way."""

    def __init__(self, model: ChineseCLIP, checkpoint_name: str, request: Request, on_stage: OnStage) -> None:
        self._model, self._checkpoint_name, self._request, self._on_stage = model, checkpoint_name, request, on_stage
        self.name = slugify(request.name or model.spec.slug)
        self.fingerprint = model_fingerprint(model.spec, model.state_dict())

    def folder(self, precision: Precision) -> Path:
        """Of that precision within the export; the only one lies at its top."""
        return Path(precision) if len(self._request.precisions) > 1 else Path()

    def export_tower(self, kind: TowerKind, staging: Path) -> dict[Precision, ExportedTower]:
        """Write and check the packages of one tower, in all precisions."""
        self._on_stage(f"tracing the {kind} tower")
        traced = trace_tower(self._model, kind)
        items = parity_items(self._model, kind, self._request.num_real)
        done: dict[Precision, ExportedTower] = {}
        for is_half in (False, True):
            precisions = [one for one in self._request.precisions if (one != "fp32") == is_half]
            if not precisions:
                continue
            self._on_stage(f"converting the {kind} tower")
            converted = convert_tower(self._model, kind, traced, is_half, self._request.minimum_ios)
            for precision in precisions:
                done[precision] = self._write_and_check(kind, precision, converted, staging, items)
            discard(converted)
        return done

    def _write_and_check(
        self, kind: TowerKind, precision: Precision, converted: Any, staging: Path, items: Sequence[Item]
    ) -> ExportedTower:
        self._on_stage(f"writing the {kind} tower in {precision}")
        path = self.folder(precision) / f"{self.name}_{kind}.mlpackage"
        (staging / path).parent.mkdir(exist_ok=True)
        compressed = compress_tower(converted, precision)
        self._describe(compressed, kind, precision)
        save_tower(compressed, staging / path)
        if compressed is not converted:
            discard(compressed)
        self._on_stage(f"comparing the {kind} tower in {precision} with PyTorch")
        parity, operations = check_package(staging / path, kind, precision, items)
        size = sum(file.stat().st_size for file in (staging / path).rglob("*") if file.is_file())
        return ExportedTower(path, size, parity, operations)

    def _describe(self, converted: Any, kind: TowerKind, precision: Precision) -> None:
        """What Xcode shows of a package."""
        spec, buckets = self._model.spec, text_buckets(self._model.spec)
        what, size = ("pictures", spec.vision.resolution) if kind == "image" else ("Chinese texts", buckets[-1])
        given = {
            "image": f"A picture of {size} x {size} pixels, RGB, the whole of it squeezed to the square.",
            "text": f"Token ids of [CLS] + text + [SEP], then 0 up to the next of {', '.join(map(str, buckets))}.",
        }
        converted.author = self._request.author
        converted.license = self._request.licence or f"Of the weights: that of the checkpoint {self._checkpoint_name}."
        converted.short_description = (
            f"Chinese-CLIP {spec.name}, {kind} tower: {what} into the space of {spec.embed_dim} dimensions where "
            f"matching pictures and texts are close by cosine. Weights {precision}."
        )
        converted.version = str(self._request.version)
        converted.input_description[INPUT_NAMES[kind]] = given[kind]
        converted.output_description[OUTPUT_NAMES[kind]] = f"float32 (1, {spec.embed_dim}), of unit length."
        # When it was converted is no part of what it is.
        converted.user_defined_metadata.pop("com.github.apple.coremltools.conversion_date", None)
        converted.user_defined_metadata.update(
            {
                "fingerprint": str(self.fingerprint),
                "logit_scale": repr(self._model.logit_scale.item()),
                "architecture": spec.name,
                "precision": precision,
                "calibration": _CALIBRATION,
            }
        )

    def card(self, precision: Precision, towers: dict[TowerKind, ExportedTower]) -> Card:
        spec = self._model.spec
        cards = {
            kind: TowerCard(
                package=tower.path.name,
                input=INPUT_NAMES[kind],
                output=OUTPUT_NAMES[kind],
                size_bytes=tower.size_bytes,
                min_cosine_with_pytorch=tower.parity.min_cosine,
                max_abs_diff_from_pytorch=tower.parity.max_abs_diff,
            )
            for kind, tower in towers.items()
        }
        return Card(
            name=self.name,
            architecture=spec.name,
            checkpoint=self._checkpoint_name,
            fingerprint=str(self.fingerprint),
            logit_scale=self._model.logit_scale.item(),
            embed_dim=spec.embed_dim,
            resolution=spec.vision.resolution,
            context_length=text_buckets(spec)[-1],
            text_buckets=text_buckets(spec),
            precision=precision,
            minimum_ios=self._request.minimum_ios,
            image=cards["image"],
            text=cards["text"],
            tokens=Tokens(vocabulary_sha256=hashlib.sha256(VOCAB_PATH.read_bytes()).hexdigest()),
        )


def check_package(
    path: Path, kind: TowerKind, precision: Precision, items: Sequence[Item]
) -> tuple[Parity, dict[str, int]]:
    """The gate: run the saved package over `items`.

    Returns:
        What was measured, and the kinds of operation of the program with their number.
    Raises:
        UnusablePackage: it is damaged, or its program cannot be run.
        ExportFailed: it computes something else than PyTorch.
    """
    package, bound = load_package(path), BOUNDS[precision]
    parity = measure_parity(package, kind, items)
    if not parity.keeps(bound):
        raise ExportFailed(
            f"{kind} tower in {precision}: cosine {parity.min_cosine:.6f}, largest difference "
            f"{parity.max_abs_diff:.1e}, unit length kept to {parity.max_length_error:.1e}; expected at least "
            f"{bound.min_cosine}, at most {bound.max_abs_diff:g} and {bound.max_length_error:g}, so nothing was placed"
        )
    return parity, dict(package.operations)
