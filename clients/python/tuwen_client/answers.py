"""Answers of the similarity and the zero-shot model, and the requests that get them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tuwen_client.codec import Array, Tensor, bytes_tensor
from tuwen_client.errors import InvalidInput, TuwenError
from tuwen_client.images import ImageLike, encode_image_file
from tuwen_client.sides import Job, encode_text, many_images, many_texts

Matrix = npt.NDArray[np.float32]
_Judged = TypeVar("_Judged", "Scores", "Classes")

Answer = TypeVar("Answer")

CHUNK = 64  # images in one request, the server's limit
CHUNKS_IN_FLIGHT = 2  # as many as a server answers at a time
_BLAMES_IMAGE = re.compile(r"^image (\d+): ", re.DOTALL)


@dataclass(frozen=True)
class Scores:
    """How well each of N images fits each of M texts.

    Attributes:
        probs: float32 (N, M): each row a softmax over the texts. Adds up to 1 even where nothing fits.
        cosine, logits_per_image: float32 (N, M): the plain similarity, and times the model's learned scale.
        relevance: float32 (N, M), 0 to 1: the probability that they belong together, by the calibration named.
        no_match: bool (N,): no text is relevant enough. Both are None without a calibration.
    """

    probs: Matrix
    cosine: Matrix
    logits_per_image: Matrix
    relevance: Matrix | None
    no_match: npt.NDArray[np.bool_] | None


@dataclass(frozen=True)
class Classes:
    """What each of N images shows, by M labels; fields as in `Scores`."""

    labels: tuple[str, ...]
    probs: Matrix
    logits_per_image: Matrix
    relevance: Matrix | None
    no_match: npt.NDArray[np.bool_] | None

    @property
    def best(self) -> list[str | None]:
        """The likeliest label of each image; None where the calibration says that nothing matches."""
        hopeless = self.no_match if self.no_match is not None else np.zeros(len(self.probs), np.bool_)
        return [
            None if none else self.labels[column]
            for column, none in zip(self.probs.argmax(axis=1), hopeless, strict=True)
        ]


def scores_job(texts: Iterable[str], calibration: str | None) -> Job[Scores]:
    """Chunks of images against these texts."""
    shared = [bytes_tensor("texts", [encode_text(text) for text in many_texts(texts)])]

    def read(arrays: Mapping[str, Array]) -> Scores:
        probs, cosine, logits_per_image = (arrays[name].copy() for name in ("probs", "cosine", "logits_per_image"))
        return Scores(probs, cosine, logits_per_image, *_judgement(arrays))

    return _job("similarity", shared, calibration, read)


def classes_job(
    labels: Iterable[str] | None,
    classifier: str | None,
    templates: Iterable[str] | None,
    calibration: str | None,
) -> Job[Classes]:
    """Chunks of images against labels, or against a classifier that the server stores."""
    if (labels is None) == (classifier is None):
        raise InvalidInput("classify takes either labels=[...] or classifier=NAME")
    shared = []
    if labels is not None:
        shared.append(bytes_tensor("labels", [encode_text(label) for label in many_texts(labels)]))
    if templates is not None:
        shared.append(bytes_tensor("templates", [encode_text(template) for template in many_texts(templates)]))
    if classifier is not None:
        shared.append(bytes_tensor("classifier", [encode_text(classifier)]))

    def read(arrays: Mapping[str, Array]) -> Classes:
        names = tuple(label.decode() for label in arrays["labels"])
        return Classes(names, arrays["probs"].copy(), arrays["logits_per_image"].copy(), *_judgement(arrays))

    return _job("zero_shot", shared, calibration, read)


def chunks(images: Iterable[ImageLike]) -> Iterator[list[ImageLike]]:
    """As many images as fit in one request, at a time; read when they are sent.

    Raises:
        InvalidInput: there is none.
    """
    rest = iter(many_images(images))
    chunk = list(itertools.islice(rest, CHUNK))
    if not chunk:
        raise InvalidInput("images is empty, expected at least one")
    while chunk:
        yield chunk
        chunk = list(itertools.islice(rest, CHUNK))


def join(parts: Sequence[_Judged]) -> _Judged:
    """The answer over all images, from those of their chunks."""

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return np.concatenate(values) if isinstance(values[0], np.ndarray) else values[0]

    return type(parts[0])(**{one.name: joined(one.name) for one in fields(parts[0])})


def blame_image(error: TuwenError) -> TuwenError:
    """The same error, pointing at an image among all of them where it pointed at one of a chunk."""
    found = _BLAMES_IMAGE.match(error.message)
    is_one = found is not None and error.index is not None
    error.index = error.index * CHUNK + int(found[1]) if is_one else None  # type: ignore[operator,index]
    error.message, error.item = error.message[found.end() :] if found else error.message, None
    return error


def _job(
    model_suffix: str,
    shared: list[Tensor],
    calibration: str | None,
    read: Callable[[Mapping[str, Array]], Answer],
) -> Job[Answer]:
    if calibration is not None:
        shared.append(bytes_tensor("calibration", [encode_text(calibration)]))

    def pack(chunk: Any) -> list[Tensor]:
        return [bytes_tensor("images", [_encoded(position, image) for position, image in enumerate(chunk)]), *shared]

    return Job(model_suffix, pack, read, lambda chunk: f"{len(chunk)} images", is_slow=lambda chunk: True)  # type: ignore[arg-type]


def _encoded(position: int, image: ImageLike) -> bytes:
    try:
        return encode_image_file(image)
    except InvalidInput as error:
        raise InvalidInput(f"image {position}: {error.message}") from error


def _judgement(arrays: Mapping[str, Array]) -> tuple[Any, Any]:
    return tuple(arrays[name].copy() if name in arrays else None for name in ("relevance", "no_match"))  # type: ignore[return-value]
