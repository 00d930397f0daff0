"""What the similarity and zero-shot models share: many concurrent calls of the two ensembles, and stored files.

Runs inside a model process of Triton (business logic scripting), where `triton_python_backend_utils` exists.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from PIL import Image

from tuwen.errors import InvalidInput
from tuwen.image_transform import MAX_IMAGE_PIXELS, preprocess_image
from tuwen.scoring import Calibration, load_calibration
from tuwen.serving.queued_model import priority_of
from tuwen.serving.request_queue import BULK
from tuwen.serving.responses import failure, refusal, response_of
from tuwen.specs import slugify
from tuwen.tokenizer import check_text

Matrix = npt.NDArray[np.float32]
Stored = TypeVar("Stored")

MAX_IMAGES = 64
MAX_TEXTS = 4096
# Of one request, at a time: the towers' queues hold 128, and others want their place in them.
_MAX_IN_FLIGHT = 64
_TEXT_OUTPUTS = ("text_embeds", "fingerprint", "logit_scale")
_ANY_RESOLUTION = 32  # whether a picture can be read does not depend on it
# What Triton 2.51 says of a part that died, is being loaded, or stops.
_RESTARTING = re.compile(r"is not healthy|is not ready|no available versions|Server is stopping|Server not ready")
_WRAPPING = re.compile(r"^(?:in ensemble '[^']*', )*(?:\[request id: [^\]]*\] )?")


# Of the request that is being answered, for the calls that answer it: each request is a task, with values of its own.
_PRIORITY: ContextVar[int] = ContextVar("priority", default=BULK)
_TIMEOUT_US: ContextVar[int] = ContextVar("timeout_us", default=0)


class CallFailed(Exception):
    """An ensemble answered with an error: its sentence, and Triton's code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Embedded:
    """embeds float32 (N, D) of unit length, the model's fingerprint, and logit_scale where a text was embedded."""

    embeds: Matrix
    fingerprint: int
    logit_scale: float | None = None


class Ensembles:
    """The text and image ensemble of one served name."""

    def __init__(self, name: str) -> None:
        Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS // 2  # as the preprocessing models have it
        self._name = name
        self._logit_scale: dict[int, float] = {}

    async def embed_images(self, files: Sequence[bytes]) -> Embedded:
        """Encoded picture files.

        Raises:
            InvalidInput: none, or too many.
            CallFailed: one of them is refused; the sentence says which.
        """
        _check_count("images", files, MAX_IMAGES)
        arrays = [np.frombuffer(file, np.uint8)[None] for file in files]
        return await self._embed("image", arrays, ["image_embeds", "fingerprint"])

    async def embed_texts(self, texts: Sequence[bytes]) -> Embedded:
        """Texts, UTF-8; raises as `embed_images`."""
        _check_count("texts", texts, MAX_TEXTS)
        arrays = [np.array([[text]], np.object_) for text in texts]
        found = await self._embed("text", arrays, list(_TEXT_OUTPUTS))
        assert found.logit_scale is not None  # it is an output of every text ensemble
        self._logit_scale[found.fingerprint] = found.logit_scale
        return found

    async def logit_scale(self, fingerprint: int) -> float:
        """The learned log of the model with this fingerprint; asks the text tower once."""
        if fingerprint not in self._logit_scale:
            await self.embed_texts(["图".encode()])
        return self._logit_scale.get(fingerprint) or _raise_changed()

    async def _embed(self, side: str, arrays: list[npt.NDArray[Any]], outputs: list[str]) -> Embedded:
        in_flight = asyncio.Semaphore(_MAX_IN_FLIGHT)

        async def call(index: int, array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
            async with in_flight:
                request = pb_utils.InferenceRequest(
                    model_name=f"{self._name}_{side}",
                    requested_output_names=outputs,
                    inputs=[pb_utils.Tensor(side, array)],
                    parameters={"queue_priority": _PRIORITY.get()},
                    timeout=_TIMEOUT_US.get(),
                )
                response = await request.async_exec()
            if response.has_error():
                raise _typed(side, index, array, response.error().message())
            return [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in outputs]

        # All of them, so that none is left running when one fails.
        answers = await asyncio.gather(*(call(*each) for each in enumerate(arrays)), return_exceptions=True)
        failure = next((answer for answer in answers if isinstance(answer, BaseException)), None)
        if failure is not None:
            raise failure
        columns = list(zip(*answers, strict=True))  # type: ignore[arg-type]
        fingerprints = {int(each.ravel()[0]) for each in columns[1]}
        if len(fingerprints) != 1:
            _raise_changed()
        scale = float(columns[2][0].ravel()[0]) if len(columns) > 2 else None
        return Embedded(np.concatenate(columns[0]), fingerprints.pop(), scale)


def _typed(side: str, index: int, array: npt.NDArray[Any], message: str) -> Exception:
    """The error of one failed call. Triton 2.51 passes on its message and loses its code."""
    sentence = _WRAPPING.sub("", message)
    if "Exceeds maximum queue size" in message or "Request timeout expired" in message:
        return CallFailed(sentence, pb_utils.TritonError.UNAVAILABLE)
    if _RESTARTING.search(message):
        again = f"{side}: a part of the server is being replaced; send it again"
        return CallFailed(again, pb_utils.TritonError.UNAVAILABLE)
    try:
        check_text(array.item()) if side == "text" else preprocess_image(array.tobytes(), _ANY_RESOLUTION)
    except InvalidInput as error:
        return InvalidInput(f"{side} {index}: {error}")
    return CallFailed(f"{side} {index}: {sentence}", pb_utils.TritonError.INTERNAL)


class StoredFiles(Generic[Stored]):
    """Files of a folder by name, read again when they change: a new one is served without a restart."""

    def __init__(self, kind: str, folder: Path, suffix: str, load: Callable[[Path], Stored]) -> None:
        self._kind, self._folder, self._suffix, self._load = kind, folder, suffix, load
        self._loaded: dict[str, tuple[tuple[int, int], Stored]] = {}

    def get(self, name: str) -> Stored:
        """The one of this name.

        Raises:
            InvalidInput: there is none, or it cannot be read.
        """
        path = self._folder / f"{name}{self._suffix}"
        if slugify(name) != name or not path.is_file():
            there = ", ".join(sorted(path.stem for path in self._folder.glob(f"*{self._suffix}"))) or "none"
            raise InvalidInput(f"no {self._kind} {name[:40]!r}; there is {there}")
        status = path.stat()
        version = (status.st_mtime_ns, status.st_ino)
        if name not in self._loaded or self._loaded[name][0] != version:
            self._loaded[name] = (version, self._load(path))
        return self._loaded[name][1]


class Calibrations(StoredFiles[Calibration]):
    """The calibrations of one served name, one a domain."""

    def __init__(self, folder: Path) -> None:
        super().__init__("calibration", folder, ".json", load_calibration)

    def judge(self, name: str | None, cosine: Matrix, fingerprint: int) -> dict[str, npt.NDArray[Any]]:
        """relevance float32 (N, M) and no_match bool (N,); nothing where no calibration is named.

        Raises:
            InvalidInput: there is none of this name, or it was made with other weights.
        """
        if name is None:
            return {}
        calibration = self.get(name)
        check_fingerprint("calibration", name, calibration.fingerprint, fingerprint)
        relevance = calibration.relevance(cosine)
        return {"relevance": relevance, "no_match": relevance.max(axis=1) < calibration.min_relevance}


def check_fingerprint(kind: str, name: str, found: int, served: int) -> None:
    """Raises InvalidInput where a stored file was made with other weights than are served."""
    if found != served:
        raise InvalidInput(f"{kind} {name} was made with model {found}, served is {served}; make it again")


async def answer_all(requests: list[Any], answer: Callable[[Any], Awaitable[dict[str, npt.NDArray[Any]]]]) -> list[Any]:
    """One response per request; a failure of ours or of an ensemble becomes a typed error."""
    return list(await asyncio.gather(*(_answer(request, answer) for request in requests)))


async def _answer(request: Any, answer: Callable[[Any], Awaitable[dict[str, npt.NDArray[Any]]]]) -> Any:
    _PRIORITY.set(priority_of(request))
    _TIMEOUT_US.set(request.timeout())
    try:
        outputs = await answer(request)
    except CallFailed as error:
        return refusal(str(error), error.code)
    except Exception as error:
        return failure(error)
    return response_of(outputs)


def _check_count(what: str, items: Sequence[bytes], most: int) -> None:
    if not 1 <= len(items) <= most:
        raise InvalidInput(f"request has {len(items)} {what}, expected 1 to {most}")


def _raise_changed() -> Any:
    raise CallFailed("the model was replaced while this request ran; send it again", pb_utils.TritonError.UNAVAILABLE)


def read_bytes(request: Any, name: str) -> list[bytes]:
    """A BYTES input; [] where it is left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else list(tensor.as_numpy().ravel())


def read_texts(request: Any, name: str) -> list[str]:
    """A BYTES input of UTF-8.

    Raises:
        InvalidInput: it is not UTF-8.
    """
    try:
        return [item.decode("utf-8") for item in read_bytes(request, name)]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name}: not UTF-8: {error.reason}") from error


def read_name(request: Any, name: str) -> str | None:
    """A BYTES input of one name, or None.

    Raises:
        InvalidInput: there are several.
    """
    found = read_texts(request, name)
    if len(found) > 1:
        raise InvalidInput(f"request has {len(found)} of {name}, expected one")
    return found[0] if found else None
