"""What one item becomes: the model it goes to, the tensors of its request, and what is read from the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from tuwen_client.codec import Array, Tensor, bytes_tensor
from tuwen_client.errors import InvalidInput
from tuwen_client.images import ImageLike, describe_image, encode_image_file

Row = npt.NDArray[np.float32]
Answer = TypeVar("Answer")

_SHOWN_CHARACTERS = 20  # of a text in an error: enough to find it, too little to log what a user wrote


@dataclass(frozen=True)
class Job(Generic[Answer]):
    """One kind of request.

    Attributes:
        model_suffix: ending of the served model's name.
        pack: an item's tensors; raises InvalidInput for what cannot be sent.
        read: the answer, from the outputs by name.
        describe: an item in a few words, for an error.
        is_slow: whether packing this item reads a file or encodes a picture.
        may_share: whether the first tensor may travel through shared memory.
    """

    model_suffix: str
    pack: Callable[[object], Sequence[Tensor]]
    read: Callable[[Mapping[str, Array]], Answer]
    describe: Callable[[object], str]
    is_slow: Callable[[object], bool] = lambda item: False
    may_share: bool = False


@dataclass(frozen=True)
class Embedded:
    """float32 (D,) of one item, and whether its text was cut to fit; None where the answer does not say."""

    row: Row
    is_truncated: bool | None = None


def text_tensors(text: object) -> Sequence[Tensor]:
    """text BYTES (1, 1), UTF-8."""
    return (bytes_tensor("text", [encode_text(text)], (1, 1)),)


def encode_text(text: object) -> bytes:
    """UTF-8; raises InvalidInput for what is no str."""
    if not isinstance(text, str):
        raise InvalidInput(f"a {type(text).__name__} is no text, expected a str")
    # surrogatepass, so that a broken string is refused by the server's sentence and not by a codec here.
    return text.encode("utf-8", "surrogatepass")


def describe_text(text: object) -> str:
    """The head of a text."""
    if not isinstance(text, str):
        return type(text).__name__
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")


def image_tensors(image: object) -> Sequence[Tensor]:
    """image UINT8 (1, size_bytes): the encoded file."""
    encoded = encode_image_file(image)  # type: ignore[arg-type]
    return (Tensor("image", "UINT8", (1, len(encoded)), encoded),)


def many_texts(texts: Iterable[str]) -> Iterable[str]:
    """The texts; one string alone, which also iterates, is refused."""
    if isinstance(texts, (str, bytes)):
        raise InvalidInput("texts is one string, expected a list of them: [text]")
    return texts


def many_images(images: Iterable[ImageLike]) -> Iterable[ImageLike]:
    """The images; one alone is refused: an array of (H, W, 3) also iterates, as H grey pictures of W x 3."""
    is_one_array = isinstance(images, np.ndarray) and images.ndim < 4
    if is_one_array or isinstance(images, (str, bytes, Path, Image.Image)):
        raise InvalidInput("images is one image, expected a list of them: [image]")
    return images


def _read_text(outputs: Mapping[str, Array]) -> Embedded:
    truncated = outputs.get("truncated")
    return Embedded(outputs["text_embeds"][0].copy(), None if truncated is None else bool(truncated.ravel()[0]))


def _read_image(outputs: Mapping[str, Array]) -> Embedded:
    return Embedded(outputs["image_embeds"][0].copy())


TEXT = Job("text", text_tensors, _read_text, describe_text)
IMAGE = Job(
    "image",
    image_tensors,
    _read_image,
    describe_image,
    is_slow=lambda item: not isinstance(item, bytes),
    may_share=True,
)
