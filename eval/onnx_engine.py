"""The two ONNX files of a built model in ONNX Runtime on the CPU: what the server runs, without the server."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.engine import EngineKind
from eval.local_engine import DEFAULT_BATCH_SIZE, LocalEngine, Rows
from tuwen.errors import InvalidInput, MissingDependency
from tuwen.specs import CONTEXT_LENGTH
from tuwen.tokenizer import pack_rows

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_TOWER_SUFFIX = "_text_tower"


class OnnxEngine(LocalEngine):
    """An Engine over MODEL_text_tower and MODEL_image_tower of a model repository; see `eval.engine`."""

    def __init__(
        self,
        repository: Path,
        model: str | None = None,
        version: int | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        """Open both towers.

        Args:
            model: the name it is served under; by default the only one that is built.
            version: by default the highest, which is what the server serves.
        Raises:
            InvalidInput: there is no such built model, its files cannot be read, or the towers are of two models.
            MissingDependency: ONNX Runtime is not installed.
        """
        name = model or _only_model(repository)
        text, image = (_Tower.open(repository / f"{name}_{side}_tower", version) for side in ("text", "image"))
        if text.fingerprint != image.fingerprint or text.folder.name != image.folder.name:
            raise InvalidInput(
                f"{text.folder} has fingerprint {text.fingerprint}, {image.folder} {image.fingerprint}: they are "
                "not two towers of one model; build both again"
            )
        # The server cuts at this length whatever the architecture says; a graph takes any.
        super().__init__(image.session.get_inputs()[0].shape[-1], CONTEXT_LENGTH, batch_size)
        self._text, self._image = text, image

    @property
    def kind(self) -> EngineKind:
        return "onnx"

    @property
    def model_name(self) -> str:
        return self._text.architecture

    @property
    def embed_dim(self) -> int:
        dim: int = self._image.session.get_outputs()[0].shape[-1]
        return dim

    @property
    def fingerprint(self) -> int:
        return self._text.fingerprint

    def _run_images(self, pixel_values: Rows) -> Rows:
        return self._image.run("image_embeds", {"pixel_values": pixel_values})

    def _run_texts(self, rows: Sequence[Sequence[int]]) -> Rows:
        return self._text.run("text_embeds", dict(pack_rows(rows)))


@dataclass(frozen=True)
class _Tower:
    """One version folder: its session, and what build.json says of it."""

    folder: Path
    session: InferenceSession
    architecture: str
    fingerprint: int

    @classmethod
    def open(cls, tower: Path, version: int | None) -> _Tower:
        folder = tower / str(version) if version is not None else _newest_version(tower)
        record = _build_record(folder / "build.json")
        return cls(folder, _open_session(folder / "model.onnx"), *record)

    def run(self, output: str, feed: dict[str, Any]) -> Rows:
        rows: Rows = self.session.run([output], feed)[0]
        return rows


def built_models(repository: Path) -> list[str]:
    """Names of the models in a repository whose text tower has been built."""
    built = {path.parents[1].name for path in repository.glob(f"*{_TOWER_SUFFIX}/*/model.onnx")}
    return sorted(name.removesuffix(_TOWER_SUFFIX) for name in built)


def _only_model(repository: Path) -> str:
    names = built_models(repository)
    if not names:
        raise InvalidInput(f"{repository}: no built model in it; `tuwen build --checkpoint DIR` makes one")
    if len(names) > 1:
        raise InvalidInput(f"{repository}: holds {', '.join(names)}; name one with --model")
    return names[0]


def _newest_version(tower: Path) -> Path:
    versions = [path.parent for path in tower.glob("*/model.onnx") if path.parent.name.isdecimal()]
    if not versions:
        raise InvalidInput(f"{tower}: no model.onnx in a version folder; `tuwen build --checkpoint DIR` makes one")
    return max(versions, key=lambda path: int(path.name))


def _build_record(path: Path) -> tuple[str, int]:
    """Architecture and fingerprint."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return str(record["architecture"]), int(record["fingerprint"])
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path}: not what `tuwen build` writes: {error}") from error


def _open_session(path: Path) -> InferenceSession:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependency("--engine onnx needs ONNX Runtime: pip install 'tuwen[serve]'") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))  # all that this process may use, not all there are
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise InvalidInput(f"{path}: ONNX Runtime cannot load it: {error}") from error
