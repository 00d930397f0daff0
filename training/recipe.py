"""A training recipe: a TOML file, validated; see training/recipes/emoji_tiny.toml for one with comments."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tuwen.errors import InvalidInput
from tuwen.specs import CONTEXT_LENGTH, get_spec


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    architecture: str
    init_checkpoint: Path | None = None

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            return get_spec(name).name
        except InvalidInput as error:
            raise ValueError(str(error)) from None


class DataSection(Section):
    path: Path
    train_split: str = "train"
    valid_split: str = "valid"
    # Captions drawn per picture and step; all of one picture's captions are its positives.
    captions_per_image: int = Field(1, ge=1)
    # How often a caption is joined with another of the same picture, as people put words together in a query; it
    # then describes only the pictures that both describe.
    join_captions: float = Field(0.0, ge=0, le=1)
    # How often each token of a longer caption is left out.
    drop_tokens: float = Field(0.0, ge=0, lt=1)
    context_length: int = Field(CONTEXT_LENGTH, ge=3)
    # Keep every decoded picture in memory (R x R x 3 bytes each): for small sets, where decoding would repeat.
    cache_decoded: bool = False


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimSection(Section):
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2)
    lr: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.2, ge=0)
    warmup_steps: int = Field(500, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class AugmentSection(Section):
    """Random changes to a training picture; 0 turns one off. Nothing mirrors: 左 and 右 are different captions."""

    rotate_degrees: float = Field(0.0, ge=0, le=180)
    min_scale: float = Field(1.0, gt=0)
    max_scale: float = Field(1.0, gt=0)
    stretch: float = Field(0.0, ge=0, lt=1)
    shear: float = Field(0.0, ge=0, lt=1)
    translate: float = Field(0.0, ge=0, lt=1)
    brightness: float = Field(0.0, ge=0, lt=1)
    contrast: float = Field(0.0, ge=0, lt=1)
    saturation: float = Field(0.0, ge=0)
    hue_degrees: float = Field(0.0, ge=0, le=180)
    grayscale: float = Field(0.0, ge=0, le=1)
    blur: float = Field(0.0, ge=0, le=1)
    erase: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} is above max_scale {self.max_scale}")
        return self


class RunSection(Section):
    out: Path
    seed: int = 0
    device: str = "cpu"
    eval_every_epochs: int = Field(1, ge=1)


class Recipe(Section):
    model: ModelSection
    data: DataSection
    optim: OptimSection
    augment: AugmentSection = AugmentSection()
    run: RunSection


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe.

    Raises:
        InvalidInput: the file cannot be read, is no TOML, or has a wrong key or value; one sentence names the first.
    """
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise InvalidInput(f"{path}: there is no such recipe") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not valid TOML: {error}") from None
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise InvalidInput(f"{path}: {key}: {message}") from None
