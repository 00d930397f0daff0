"""Which engine: a kind and its place -> an open Engine.

    with open_engine("torch", checkpoint=Path("samples/emoji_tiny")) as engine:
        rows = list(engine.embed_texts(["一只猫"]))

On a command line a place is one word: torch:CHECKPOINT, onnx:REPOSITORY/NAME@VERSION, triton:HOST:PORT/NAME.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from eval.engine import Engine, EngineKind
from tuwen.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from tuwen_client import Tls

DEFAULT_REPOSITORY = Path("model_repository")
DEFAULT_URL = "localhost:8001"
_FORMS = "torch:CHECKPOINT, onnx:REPOSITORY[/NAME[@VERSION]] or triton:HOST:PORT[/NAME]"


def open_engine(
    kind: EngineKind,
    *,
    checkpoint: Path | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
    repository: Path = DEFAULT_REPOSITORY,
    model: str | None = None,
    version: int | None = None,
    url: str = DEFAULT_URL,
    token: str | None = None,
    tls: Tls | None = None,
) -> Engine:
    """An engine, ready to embed; each kind reads its own arguments alone.

    Args:
        checkpoint, device: of torch.
        batch_size: of torch and onnx; the server makes its own.
        repository, version: of onnx.
        model: of onnx and triton: the name it is served under; default: the only one.
        url, token, tls: of triton.
    Raises:
        InvalidInput: what is to be opened is not named, not there or not readable.
        MissingDependency: the engine's library is not installed.
    """
    # Imported where they are used: each needs a library that an installation may lack.
    sizes = {} if batch_size is None else {"batch_size": batch_size}
    if kind == "torch":
        from eval.torch_engine import TorchEngine

        if checkpoint is None:
            raise InvalidInput("the torch engine needs a checkpoint: --checkpoint DIR")
        return TorchEngine.open(checkpoint, device, **sizes)
    if kind == "onnx":
        from eval.onnx_engine import OnnxEngine

        return OnnxEngine(repository, model, version, **sizes)
    try:
        from eval.triton_engine import TritonEngine
    except ImportError as error:
        raise MissingDependency("the triton engine needs the client: pip install tuwen-client") from error
    return TritonEngine(url, model, token, tls)


def open_engine_at(place: str, device: str = "cpu", token: str | None = None, tls: Tls | None = None) -> Engine:
    """An engine by one word: torch:CHECKPOINT, onnx:REPOSITORY/NAME@VERSION or triton:HOST:PORT/NAME.

    NAME and VERSION may be left out, as in `open_engine`.

    Raises:
        InvalidInput: it is no such word; or as `open_engine`.
    """
    kind, _, where = place.partition(":")
    if kind == "torch" and where:
        return open_engine("torch", checkpoint=Path(where), device=device)
    if kind == "onnx" and where:
        repository, model, version = _repository_parts(where)
        return open_engine("onnx", repository=repository, model=model, version=version)
    if kind == "triton" and where:
        url, _, model = where.partition("/")
        return open_engine("triton", url=url, model=model or None, token=token, tls=tls)
    raise InvalidInput(f"engine {place!r}: expected {_FORMS}")


def _repository_parts(where: str) -> tuple[Path, str | None, int | None]:
    """REPOSITORY/NAME@VERSION apart; a folder that is there as it stands is a repository without a name."""
    if Path(where).is_dir():
        return Path(where), None, None
    folder, _, last = where.rpartition("/")
    match = re.fullmatch(r"([a-z0-9_]+)(?:@([0-9]+))?", last)
    if match is None:
        raise InvalidInput(f"engine onnx:{where}: expected onnx:REPOSITORY[/NAME[@VERSION]]")
    return Path(folder or "."), match[1], int(match[2]) if match[2] else None
