"""The two sides of a model: how one item becomes the tensor of one request, and how it is named in an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from PIL import Image

from tuwen_client.errors import InvalidInput
from tuwen_client.images import ImageLike, describe_image, encode_image_file

_SHOWN_CHARACTERS = 20  # of a text in an error: enough to find it, too little to log what a user wrote


@dataclass(frozen=True)
class Side:
    """One of a model's two ensembles.

    Attributes:
        name: of the input tensor, and the ending of the ensemble's name.
        make_input: the request's tensor; raises InvalidInput for what cannot be sent.
        describe: a few words for an error.
    """

    name: str
    make_input: Callable[[object], triton.InferInput]
    describe: Callable[[object], str]

    @property
    def output(self) -> str:
        """Name of the tensor that holds the embedding."""
        return f"{self.name}_embeds"


def text_input(text: object) -> triton.InferInput:
    """text BYTES (1, 1), UTF-8."""
    if not isinstance(text, str):
        raise InvalidInput(f"a {type(text).__name__} is no text, expected a str")
    tensor = triton.InferInput("text", [1, 1], "BYTES")
    # surrogatepass, so that a broken string is refused by the server's sentence and not by a codec here.
    return tensor.set_data_from_numpy(np.array([[text.encode("utf-8", "surrogatepass")]], dtype=np.object_))


def describe_text(text: object) -> str:
    """The head of a text."""
    if not isinstance(text, str):
        return type(text).__name__
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")


def image_input(image: object) -> triton.InferInput:
    """image UINT8 (1, size_bytes): the encoded file."""
    encoded = np.frombuffer(encode_image_file(image), dtype=np.uint8)[None]  # type: ignore[arg-type]
    return triton.InferInput("image", list(encoded.shape), "UINT8").set_data_from_numpy(encoded)


def many_texts(texts: Iterable[str]) -> Iterator[str]:
    """The texts; one string alone, which also iterates, is refused."""
    if isinstance(texts, (str, bytes)):
        raise InvalidInput("texts is one string, expected a list of them: [text]")
    return iter(texts)


def many_images(images: Iterable[ImageLike]) -> Iterator[ImageLike]:
    """The images; one alone is refused: an array of (H, W, 3) also iterates, as H grey pictures of W x 3."""
    is_one_array = isinstance(images, np.ndarray) and images.ndim < 4
    if is_one_array or isinstance(images, (str, bytes, Path, Image.Image)):
        raise InvalidInput("images is one image, expected a list of them: [image]")
    return iter(images)


TEXT = Side("text", text_input, describe_text)
IMAGE = Side("image", image_input, describe_image)
