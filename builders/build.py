"""Checkpoint -> served model: both towers to ONNX, checked against PyTorch, placed in the model repository.

tuwen build --checkpoint samples/emoji_tiny
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from builders.onnx_export import OPSET, TOWERS, ExportFailed, TowerKind, export_tower
from builders.parity import MAX_ABS_DIFF, MIN_COSINE, Parity, measure_parity
from builders.repository import REPOSITORY_DIR, check_contract, rendered_files, write_rendered
from tuwen import __version__
from tuwen.checkpoint import load_checkpoint
from tuwen.errors import InvalidInput
from tuwen.files import replace_folder
from tuwen.fingerprint import model_fingerprint
from tuwen.hub import PUBLISHED, download
from tuwen.model import ChineseCLIP

# Packages whose version shapes the artifact.
_TOOLS = ("torch", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime")


@dataclass(frozen=True)
class BuildResult:
    """What stands in the repository now."""

    name: str
    version: int
    fingerprint: int
    parity: dict[TowerKind, Parity]
    repository: Path


def build(
    checkpoint: Path,
    name: str | None = None,
    repository: Path = REPOSITORY_DIR,
    model_version: int = 1,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> BuildResult:
    """Export, check and place both towers of a checkpoint; nothing is placed unless both pass.

    Args:
        checkpoint: a checkpoint folder, an official `.pt`, or a published name, which is downloaded.
        name: what the models are served under; by default the architecture's slug.
        model_version: the version folder; a fine-tuned checkpoint becomes 2 beside 1.
        on_stage: hears what is going on, a short phrase each time.
    Raises:
        InvalidInput: the checkpoint cannot be read, the version is no positive number, or the name is that of a
            model with other tensors.
        ExportFailed: a tower cannot be exported, or differs from PyTorch.
    """
    if model_version < 1:
        raise InvalidInput(f"version {model_version}: expected 1 or more")
    on_stage("reading the checkpoint")
    if not checkpoint.exists() and str(checkpoint) in PUBLISHED:
        checkpoint = download(str(checkpoint), Path("~/.cache/clip").expanduser())
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
            record = _build_record(model, checkpoint, kind, fingerprint, parity[kind])
            (staging / kind / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        on_stage("placing")
        files |= _shared_code()
        write_rendered(files, repository, overwrite=False)
        for kind in TOWERS:
            _place(staging / kind, repository / f"{name}_{kind}_tower" / str(model_version))
            (repository / f"{name}_{kind}" / str(model_version)).mkdir(exist_ok=True)
    return BuildResult(name, model_version, fingerprint, parity, repository)


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


def _build_record(
    model: ChineseCLIP, checkpoint: Path, kind: TowerKind, fingerprint: int, parity: Parity
) -> dict[str, Any]:
    weights = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "architecture": model.spec.name,
        "tower": kind,
        "fingerprint": fingerprint,
        "checkpoint": {"name": checkpoint.name, "sha256": digest},
        "precision": "fp32",
        "opset": OPSET,
        "parity_with_pytorch": asdict(parity),
        "tools": {"tuwen": __version__} | {tool: version(tool) for tool in _TOOLS},
    }


def _shared_code() -> dict[Path, str]:
    """The hand-written model.py of the tokenizer, for a repository other than the checkout's own."""
    path = Path("tokenize_text", "1", "model.py")
    return {path: (REPOSITORY_DIR / path).read_text(encoding="utf-8")}


def _place(staging: Path, version_dir: Path) -> None:
    """Put one tower where Triton reads it: the version folder is replaced whole, or not at all."""
    version_dir.parent.mkdir(parents=True, exist_ok=True)
    (staging / ".gitkeep").touch()
    replace_folder(staging, version_dir)
