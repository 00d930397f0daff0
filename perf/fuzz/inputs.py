"""Input number `index` of a seed: always the same bytes, so that two numbers reproduce what was found.

python -m perf.fuzz --seed 0 --start 4711 --inputs 1
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from perf.fuzz.mutations import mutate_picture
from perf.fuzz.pictures import seed_pictures
from perf.fuzz.texts import make_text

Kind = Literal["image", "text"]
TEXT_EVERY = 4
_INTACT_IN = 50


@dataclass(frozen=True)
class FuzzInput:
    """One request's payload."""

    kind: Kind
    format: str
    data: bytes
    intact: bool  # a valid file: refusing it is a failure

    def array(self) -> npt.NDArray[Any]:
        """The tensor of a request: BYTES [1, 1] or UINT8 [1, size]."""
        return np.array([[self.data]], np.object_) if self.kind == "text" else np.frombuffer(self.data, np.uint8)[None]


def make_input(seed: int, index: int) -> FuzzInput:
    """Every fourth is a text; one picture in fifty is left as it was."""
    rng = Random(f"{seed}:{index}")
    if index % TEXT_EVERY == 0:
        return FuzzInput("text", "text", make_text(rng, index // TEXT_EVERY), False)
    pictures = seed_pictures()
    format, encoded = rng.choice(pictures)
    if rng.randrange(_INTACT_IN) == 0:
        return FuzzInput("image", format, encoded, True)
    return FuzzInput("image", format, mutate_picture(rng, format, encoded, rng.choice(pictures)[1]), False)
