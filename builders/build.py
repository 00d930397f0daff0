"""Checkpoint -> served model: both towers to ONNX, checked against PyTorch, placed in the model repository.

tuwen build --checkpoint samples/emoji_tiny
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from builders.build_record import Place, Record, checkpoint_record, find_current, read_record, tool_versions
from builders.onnx_export import OPSET, export_tower
from builders.parity import MAX_ABS_DIFF, MIN_COSINE, Parity, measure_parity
from builders.quantize import MAX_RECALL_LOSS, QuantizationCost, measure_cost, open_embed, quantize_tower
from builders.quantize import MIN_COSINE as MIN_INT8_COSINE
from builders.repository import REPOSITORY_DIR, check_contract, rendered_files, write_rendered
from builders.towers import TOWERS, ExportFailed, TowerKind
from tuwen.checkpoint import load_checkpoint
from tuwen.errors import InvalidInput
from tuwen.files import replace_folder
from tuwen.fingerprint import model_fingerprint
from tuwen.hub import PUBLISHED, download
from tuwen.model import ChineseCLIP

Precision = Literal["fp32", "int8"]


@dataclass(frozen=True)
class BuildResult:
    """What stands in the repository now; `is_current`: it did before, and nothing was made."""

    name: str
    version: int
    fingerprint: int
    resolution: int
    parity: dict[TowerKind, Parity]
    repository: Path
    precision: Precision = "fp32"
    int8_cost: QuantizationCost | None = None
    is_current: bool = False

    @property
    def place(self) -> Place:
        return Place(self.repository, self.name, self.version)


def build(
    checkpoint: Path,
    name: str | None = None,
    repository: Path = REPOSITORY_DIR,
    model_version: int = 1,
    on_stage: Callable[[str], None] = lambda stage: None,
    precision: Precision = "fp32",
    if_changed: bool = False,
) -> BuildResult:
    """Export, check and place both towers of a checkpoint; nothing is placed unless both pass.

    Args:
        checkpoint: a checkpoint folder, an official `.pt`, or a published name, which is downloaded.
        name: what the models are served under; by default the architecture's slug.
        model_version: the version folder; a fine-tuned checkpoint becomes 2 beside 1.
        on_stage: hears what is going on, a short phrase each time.
        precision: int8 quantises the towers that passed, and places them only if that costs next to nothing.
        if_changed: make nothing where the same checkpoint, built the same way, stands there already.
    Raises:
        InvalidInput: the checkpoint cannot be read, the version is no positive number, the precision is unknown, or
            the name is that of a model with other tensors.
        ExportFailed: a tower cannot be exported, differs from PyTorch, or loses too much by int8.
    """
    if model_version < 1:
        raise InvalidInput(f"version {model_version}: expected 1 or more")
    if precision not in get_args(Precision):
        raise InvalidInput(f"precision {precision}: expected {' or '.join(get_args(Precision))}")
    on_stage("reading the checkpoint")
    checkpoint = resolve_checkpoint(checkpoint)
    if if_changed and (served := find_current(checkpoint, name, repository, model_version, precision)):
        return _current_result(Place(repository, served, model_version))
    model = load_checkpoint(checkpoint)
    name = name or model.spec.slug
    files = rendered_files(model.spec, name)
    check_contract(files, repository)
    fingerprint = model_fingerprint(model.spec, model.state_dict())
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=repository) as staging_name:
        staging = Path(staging_name)
        parity = {}
        for kind in TOWERS:
            parity[kind] = _build_tower(model, kind, fingerprint, staging / kind, on_stage)
        int8_cost = _quantize(model, staging, on_stage) if precision == "int8" else None
        for kind in TOWERS:
            record = _build_record(model, checkpoint, kind, fingerprint, parity[kind], int8_cost)
            (staging / kind / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        on_stage("placing")
        _place_all(staging, files, Place(repository, name, model_version))
    return BuildResult(
        name, model_version, fingerprint, model.spec.vision.resolution, parity, repository, precision, int8_cost
    )


def resolve_checkpoint(checkpoint: Path) -> Path:
    """The path itself, or where the published checkpoint of that name was downloaded to."""
    if not checkpoint.exists() and str(checkpoint) in PUBLISHED:
        return download(str(checkpoint), Path("~/.cache/clip").expanduser())
    return checkpoint


def _build_tower(
    model: ChineseCLIP, kind: TowerKind, fingerprint: int, staging: Path, on_stage: Callable[[str], None]
) -> Parity:
    staging.mkdir()
    onnx_path = staging / "model.onnx"
    on_stage(f"exporting the {kind} tower")
    export_tower(model, kind, fingerprint, onnx_path)
    on_stage(f"comparing the {kind} tower with PyTorch")
    parity = measure_parity(model, kind, onnx_path, fingerprint)
    if not parity.passed:
        raise ExportFailed(
            f"{kind} tower: cosine {parity.min_cosine:.6f}, largest difference {parity.max_abs_diff:.1e}; "
            f"expected at least {MIN_COSINE} and at most {MAX_ABS_DIFF:.0e}, so nothing was placed"
        )
    return parity


def _quantize(model: ChineseCLIP, staging: Path, on_stage: Callable[[str], None]) -> QuantizationCost:
    """Replace both staged towers by their int8 form."""
    fp32: dict[TowerKind, Path] = {kind: staging / kind / "model.onnx" for kind in TOWERS}
    int8: dict[TowerKind, Path] = {kind: staging / kind / "int8.onnx" for kind in TOWERS}
    for kind in TOWERS:
        on_stage(f"quantising the {kind} tower")
        quantize_tower(fp32[kind], int8[kind])
    on_stage("comparing int8 with float32 on Emoji-CN")
    context_length = min(model.spec.context_length, model.spec.text.max_positions)
    exact, low = ({kind: open_embed(path) for kind, path in paths.items()} for paths in (fp32, int8))
    cost = measure_cost(exact, low, model.spec.vision.resolution, context_length)
    if not cost.passed:
        raise ExportFailed(
            f"int8: cosine {min(cost.min_cosine.values()):.5f}, recall@10 {cost.recall_at_10:.1%} where float32 has "
            f"{cost.recall_at_10_fp32:.1%}; expected at least {MIN_INT8_COSINE} and a loss of at most "
            f"{100 * MAX_RECALL_LOSS:.1f} points, so nothing was placed"
        )
    for kind in TOWERS:
        int8[kind].replace(fp32[kind])
        fp32[kind].with_name("model.onnx.data").unlink(missing_ok=True)
    return cost


def _build_record(
    model: ChineseCLIP,
    checkpoint: Path,
    kind: TowerKind,
    fingerprint: int,
    parity: Parity,
    int8_cost: QuantizationCost | None,
) -> Record:
    return {
        "architecture": model.spec.name,
        "tower": kind,
        "fingerprint": fingerprint,
        "resolution": model.spec.vision.resolution,
        "checkpoint": checkpoint_record(checkpoint),
        "precision": "int8" if int8_cost else "fp32",
        "opset": OPSET,
        "parity_with_pytorch": asdict(parity),  # of the float32 export, also where int8 is what is served
        **({"int8_against_fp32": asdict(int8_cost)} if int8_cost else {}),
        "tools": tool_versions(),
    }


def _current_result(place: Place) -> BuildResult:
    """What the records say of a model that `find_current` found."""
    records = {kind: read_record(place.tower_dir(kind) / "build.json") or {} for kind in TOWERS}
    parity = {kind: Parity(**record["parity_with_pytorch"]) for kind, record in records.items()}
    image = records["image"]
    cost = QuantizationCost(**image["int8_against_fp32"]) if "int8_against_fp32" in image else None
    return BuildResult(
        place.name, place.version, image["fingerprint"], image["resolution"], parity, place.repository,
        image["precision"], cost, is_current=True,
    )  # fmt: skip


def _shared_code() -> dict[Path, str]:
    """The hand-written model.py of the tokenizer, for a repository other than the checkout's own."""
    path = Path("tokenize_text", "1", "model.py")
    return {path: (REPOSITORY_DIR / path).read_text(encoding="utf-8")}


def _place_all(staging: Path, files: dict[Path, str], place: Place) -> None:
    write_rendered(files | _shared_code(), place.repository, overwrite=False)
    for kind in TOWERS:
        _place(staging / kind, place.tower_dir(kind))
    for folder in place.ensemble_dirs():
        folder.mkdir(exist_ok=True)


def _place(staging: Path, version_dir: Path) -> None:
    """Put one tower where Triton reads it: the version folder is replaced whole, or not at all."""
    version_dir.parent.mkdir(parents=True, exist_ok=True)
    (staging / ".gitkeep").touch()
    replace_folder(staging, version_dir)
