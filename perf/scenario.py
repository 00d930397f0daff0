"""A load scenario: a TOML file, validated; perf/scenarios/ has those that are kept, with comments."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from perf.workload import MAX_CHARACTERS, MEDIAN_CHARACTERS, SPREAD
from tuwen.errors import InvalidInput

Kind = Literal["text", "image", "mixed"]
StreamKind = Literal["text", "image"]
SCENARIOS_DIR = Path(__file__).parent / "scenarios"

Concurrency = Annotated[int, Field(ge=1, le=1024)]
Rate = Annotated[float, Field(gt=0)]
# Above twice the capacity every request is refused, and nothing is measured.
Fraction = Annotated[float, Field(gt=0, le=2)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextSection(Section):
    """Queries: lengths in characters from a log-normal, rounded and cut to 1..max_characters; words of Emoji-CN."""

    count: int = Field(500, ge=1)
    median_characters: float = Field(MEDIAN_CHARACTERS, ge=1)
    spread: float = Field(SPREAD, ge=0, le=2)
    max_characters: int = Field(MAX_CHARACTERS, ge=1)


class ImageSize(Section):
    """JPEGs of this width and height; `share` of all pictures, in proportion to the other sizes' shares."""

    width: int = Field(ge=1, le=8000)
    height: int = Field(ge=1, le=8000)
    share: float = Field(gt=0)


class ImageSection(Section):
    """Eight photographs as JPEGs of quality 90, in the sizes given."""

    count: int = Field(40, ge=1)
    sizes: tuple[ImageSize, ...] = Field(min_length=1)


class LoadSection(Section):
    """Which loads, and how often each is measured."""

    # Closed loop: so many requests always under way.
    concurrencies: tuple[Concurrency, ...] = Field(min_length=1)
    # Open loop: Poisson arrivals at so many requests a second, or at these fractions of what the closed loop reached.
    rates: tuple[Rate, ...] = ()
    capacity_fractions: tuple[Fraction, ...] = ()
    # `tuwen bench compare` tells noise by the repeats: three at least, five to see smaller differences.
    repeats: int = Field(3, ge=1)
    # Of a mixed load: the part of the concurrency, and of absolute rates, that is pictures.
    image_share: float = Field(0.25, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_kind_of_rate(self) -> Self:
        if self.rates and self.capacity_fractions:
            raise ValueError("rates and capacity_fractions are two ways to say the same; give one")
        for name in ("concurrencies", "rates", "capacity_fractions"):
            levels = getattr(self, name)
            if len(set(levels)) != len(levels):
                raise ValueError(f"{name} names a level twice")
        return self


class MeasureSection(Section):
    """Of one measurement: three windows; it is unsteady where they differ by more than stability_percent."""

    window_s: float = Field(2.0, ge=0.2, le=60)
    percentile: Literal[50, 90, 95, 99] = 95
    stability_percent: float = Field(25, gt=0)
    warm_up_s: float = Field(3.0, ge=0)


class Scenario(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    kind: Kind
    seed: int = 0
    text: TextSection | None = None
    image: ImageSection | None = None
    load: LoadSection
    measure: MeasureSection = MeasureSection()

    @model_validator(mode="after")
    def _has_its_streams(self) -> Self:
        for stream in ("text", "image"):
            is_given, is_sent = getattr(self, stream) is not None, stream in self.streams
            if is_given and not is_sent:
                raise ValueError(f"a scenario of kind {self.kind} sends no {stream}; leave out [{stream}]")
            if is_sent and not is_given:
                raise ValueError(f"a scenario of kind {self.kind} needs a section [{stream}]")
        if self.kind == "mixed" and min(self.load.concurrencies) < 2:
            raise ValueError("a mixed load needs concurrencies of at least 2, one request of either kind")
        return self

    @property
    def streams(self) -> tuple[StreamKind, ...]:
        return ("text", "image") if self.kind == "mixed" else (self.kind,)


def find_scenario(name: str) -> Path:
    """The file of that name, or the scenario that is kept under it: `text` is perf/scenarios/text.toml."""
    kept = SCENARIOS_DIR / f"{name}.toml"
    return kept if not Path(name).exists() and kept.exists() else Path(name)


def load_scenario(path: Path) -> tuple[Scenario, str]:
    """Read and validate a scenario; it, and the text of its file.

    Raises:
        InvalidInput: the file cannot be read, is no TOML, or has a wrong key or value; one sentence names the first.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except FileNotFoundError:
        kept = ", ".join(sorted(one.stem for one in SCENARIOS_DIR.glob("*.toml")))
        raise InvalidInput(f"{path}: there is no such scenario; those kept are {kept}") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not valid TOML: {error}") from None
    try:
        return Scenario.model_validate(values), text
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join(filter(None, [str(path), ".".join(str(part) for part in first["loc"])]))
        message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise InvalidInput(f"{where}: {message}") from None
