"""Recipes: the ones that ship load, and whatever is wrong with one is a sentence."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from training.recipe import Recipe, load_recipe
from training.train import build_optimizer
from tuwen.errors import InvalidInput
from tuwen.model import ChineseCLIP
from tuwen.specs import SPECS, get_spec

RECIPES_DIR = Path(__file__).parents[2] / "training" / "recipes"
RECIPES = sorted(RECIPES_DIR.glob("*.toml"))

RECIPE = """
[model]
architecture = "Tiny-ViT"

[data]
path = "data/shapes"

[optim]
epochs = 2
batch_size = 8
lr = 1e-3

[augment]
rotate_degrees = 10

[run]
out = "runs/shapes"
"""


def load_text(text: str, folder: Path) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def test_a_recipe_needs_little(tmp_path: Path) -> None:
    """What it does not say has the defaults."""
    recipe = load_text(RECIPE, tmp_path)
    assert recipe.model.architecture == "Tiny-ViT"
    assert recipe.data.path == Path("data/shapes")
    assert (recipe.data.train_split, recipe.data.valid_split, recipe.data.context_length) == ("train", "valid", 52)
    assert recipe.augment.rotate_degrees == 10
    assert (recipe.augment.min_scale, recipe.augment.erase) == (1, 0)
    assert load_text(RECIPE.replace("[augment]\nrotate_degrees = 10\n", ""), tmp_path).augment.rotate_degrees == 0


def test_a_slug_names_the_architecture_too(tmp_path: Path) -> None:
    """vit_b_16 is ViT-B-16."""
    assert load_text(RECIPE.replace("Tiny-ViT", "vit_b_16"), tmp_path).model.architecture == "ViT-B-16"


def test_there_are_recipes() -> None:
    """Else the test of each would pass on none."""
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_that_ship_load(path: Path) -> None:
    """They name a known architecture, and their optimizer settings are ones that torch takes."""
    recipe = load_recipe(path)
    assert recipe.model.architecture in SPECS
    with torch.device("meta"):
        model = ChineseCLIP(get_spec(recipe.model.architecture))
    build_optimizer(model, recipe.optim)


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        ("rotate_degrees = 10", "rotate_degres = 10", "augment.rotate_degres: unknown key"),
        ("[augment]", "[agument]", "agument: unknown key"),
        ("epochs = 2", "epochs = 0", "optim.epochs: Input should be greater than or equal to 1"),
        ("epochs = 2", 'epochs = "two"', "optim.epochs: Input should be a valid integer"),
        ("batch_size = 8", "batch_size = 1", "optim.batch_size: Input should be greater than or equal to 2"),
        ("lr = 1e-3", "lr = nan", "optim.lr: Input should be greater than 0"),
        ("lr = 1e-3", "", "optim.lr: Field required"),
        ("lr = 1e-3", "lr = 1e-3\nbetas = [0.9, 1.5]", "optim.betas.1: Input should be less than 1"),
        ("rotate_degrees = 10", "rotate_degrees = 270", "augment.rotate_degrees: Input should be less than or equal"),
        ("rotate_degrees = 10", "min_scale = 2", "augment: Value error, min_scale 2.0 is above max_scale 1.0"),
        ('path = "data/shapes"', 'path = "x"\ncontext_length = 2', "data.context_length: Input should be greater"),
        ("Tiny-ViT", "ViT-B-61", "model.architecture: Value error, architecture 'ViT-B-61' is unknown; known are RN50"),
        ('[run]\nout = "runs/shapes"', "", "run: Field required"),
        ("[model]", "[model", "not valid TOML: "),
        ("[model]", "[optim]", "not valid TOML: Cannot declare"),
    ],
)
def test_a_mistake_is_one_sentence(right: str, wrong: str, reason: str, tmp_path: Path) -> None:
    """It names the file, the key and what was expected."""
    assert RECIPE.count(right) == 1
    with pytest.raises(InvalidInput, match=rf"recipe\.toml: {re.escape(reason)}") as caught:
        load_text(RECIPE.replace(right, wrong), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """One sentence, no FileNotFoundError."""
    with pytest.raises(InvalidInput, match=r"nowhere\.toml: there is no such recipe$"):
        load_recipe(tmp_path / "nowhere.toml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    """One sentence, no IsADirectoryError."""
    with pytest.raises(InvalidInput, match=rf"cannot be read: {os.strerror(errno.EISDIR)}$"):
        load_recipe(tmp_path)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    """TOML is UTF-8; GBK is a likely slip."""
    (tmp_path / "gbk.toml").write_bytes("# 图文".encode("gbk"))
    with pytest.raises(InvalidInput, match=r"gbk\.toml: not valid TOML: .*utf-8"):
        load_recipe(tmp_path / "gbk.toml")


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    """Frozen: what the model card prints is what ran."""
    recipe = load_text(RECIPE, tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        recipe.optim.lr = 1.0
