"""What stands beside each artifact, and whether an artifact is still what a build would make."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from builders.onnx_export import OPSET
from builders.towers import TOWERS, TowerKind
from tuwen import __version__
from tuwen.specs import slugify

# Packages whose version shapes the artifact.
TOOLS = ("torch", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime")
_ROOT = Path(__file__).parents[1]
# Of a model that is served under NAME, beside its towers; a build adds their version folders.
_ENSEMBLES = ("text", "image", "text_cached")

Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where one served model lies: `name` and the version folder."""

    repository: Path
    name: str
    version: int

    def tower_dir(self, kind: TowerKind) -> Path:
        return self.repository / f"{self.name}_{kind}_tower" / str(self.version)

    def ensemble_dirs(self) -> tuple[Path, ...]:
        # A version is part of the cache's key: new weights never meet old answers.
        return tuple(self.repository / f"{self.name}_{one}" / str(self.version) for one in _ENSEMBLES)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_record(checkpoint: Path) -> dict[str, str]:
    """Its name and the hash of its weights."""
    return {"name": checkpoint.name, "sha256": sha256(_weights_of(checkpoint))}


def _weights_of(checkpoint: Path) -> Path:
    return checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint


def tool_versions(*more: str) -> dict[str, str]:
    """Of all that shapes an artifact, our own sources among it: between two releases they change too."""
    return {"tuwen": __version__, "source": _source_digest()} | {tool: _version(tool) for tool in (*TOOLS, *more)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@cache
def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted([*(_ROOT / "builders").glob("*.py"), *(_ROOT / "tuwen").glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_record(path: Path) -> Record | None:
    """A record, or None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def find_current(
    checkpoint: Path, name: str | None, repository: Path, model_version: int, precision: str
) -> str | None:
    """The name under which the checkpoint is served already, just as a build would make it now; None if it is not.

    Args:
        name: as given to the build; None stands for the architecture's own, which the record knows.
    """
    if not _weights_of(checkpoint).is_file():  # no checkpoint, which loading it says in a sentence
        return None
    expected = {
        "checkpoint": checkpoint_record(checkpoint),
        "precision": precision,
        "opset": OPSET,
        "tools": tool_versions(),
    }
    pattern = f"{name or '*'}_text_tower/{model_version}/build.json"
    for path in sorted(repository.glob(pattern)):
        served = path.parts[-3].removesuffix("_text_tower")
        if _is_complete(Place(repository, served, model_version), expected, None if name else served):
            return served
    return None


def _is_complete(place: Place, expected: Record, slug: str | None) -> bool:
    """Whether both towers were made of what is expected, and everything is there that goes with them."""
    for kind in TOWERS:
        record = read_record(place.tower_dir(kind) / "build.json") or {}
        if any(record.get(key) != value for key, value in expected.items()):
            return False
        if slug is not None and slugify(record["architecture"]) != slug:
            return False
    files = [place.tower_dir(kind) / "model.onnx" for kind in TOWERS]
    folders = [*place.ensemble_dirs(), *(place.tower_dir(kind) for kind in TOWERS)]
    configs = [folder.parent / "config.pbtxt" for folder in folders]
    return all(path.exists() for path in (*files, *folders, *configs))
