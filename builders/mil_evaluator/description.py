"""What a package says of itself, as Xcode shows it: features in and out, and metadata.

Field numbers are those of coremltools' Model.proto and FeatureTypes.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from builders.mil_evaluator.errors import UnusablePackage
from builders.mil_evaluator.types import Array
from builders.mil_evaluator.wire import Message

_RGB, _BGR = 20, 30
_ARRAY_TYPES = {65568: "fp32", 65600: "fp64", 65552: "fp16", 131104: "int32", 131080: "int8"}


@dataclass(frozen=True)
class ImageFeature:
    """A picture of one size: uint8 (height, width, 3) RGB."""

    name: str
    summary: str
    width: int
    height: int
    is_bgr: bool

    def to_tensor(self, value: Array) -> Array:
        """float32 (1, 3, height, width), 0 to 255: what Core ML hands to the program.

        Raises:
            UnusablePackage: another size or type.
        """
        if value.dtype != np.uint8 or value.shape != (self.height, self.width, 3):
            raise UnusablePackage(
                f"{self.name}: {value.dtype} {list(value.shape)}, expected uint8 {[self.height, self.width, 3]}"
            )
        planes = value.transpose(2, 0, 1)[None].astype(np.float32)
        return planes[:, ::-1] if self.is_bgr else planes


@dataclass(frozen=True)
class ArrayFeature:
    """A multi-array of one of several shapes."""

    name: str
    summary: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]

    def to_tensor(self, value: Array) -> Array:
        """
        Raises:
            UnusablePackage: of no shape that the package lists; Core ML refuses it too.
        """
        if value.shape not in self.shapes:
            raise UnusablePackage(f"{self.name}: shape {list(value.shape)}, expected one of {list(self.shapes)}")
        return value


@dataclass(frozen=True)
class Description:
    """The inputs, the outputs and the metadata of a package."""

    inputs: Mapping[str, ImageFeature | ArrayFeature]
    outputs: Mapping[str, ImageFeature | ArrayFeature]
    summary: str
    version: str
    author: str
    licence: str
    user_defined: Mapping[str, str]


def parse_description(model: Message) -> Description:
    """
    Raises:
        UnusablePackage: a feature is neither a picture in colour nor a multi-array.
    """
    description = model.message(2)
    metadata = description.message(100)
    return Description(
        inputs={each.text(1): _feature(each) for each in description.messages(1)},
        outputs={each.text(1): _feature(each) for each in description.messages(10)},
        summary=metadata.text(1),
        version=metadata.text(2),
        author=metadata.text(3),
        licence=metadata.text(4),
        user_defined={entry.text(1): entry.text(2) for entry in metadata.messages(100)},
    )


def _feature(message: Message) -> ImageFeature | ArrayFeature:
    name, summary, type = message.text(1), message.text(2), message.message(3)
    if type.has(4):
        image = type.message(4)
        if image.integer(3) not in (_RGB, _BGR):
            raise UnusablePackage(f"{name} is no picture in colour, which is all the evaluator knows")
        return ImageFeature(name, summary, image.integer(1), image.integer(2), image.integer(3) == _BGR)
    if type.has(5):
        array = type.message(5)
        shapes = [tuple(each.packed_integers(1)) for each in array.message(21).messages(1)]
        default = tuple(array.packed_integers(1))
        dtype = _ARRAY_TYPES.get(array.integer(2), "unknown")
        return ArrayFeature(name, summary, dtype, tuple(dict.fromkeys([default, *shapes])))
    raise UnusablePackage(f"{name} is neither a picture nor a multi-array, which is all the evaluator knows")
