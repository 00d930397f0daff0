"""Recipes: the ones that ship load, and whatever is wrong with one is a sentence."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from training.recipe import Recipe, Source, load_recipe
from tuwen.errors import InvalidInput

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


def load_text(text: str, folder: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def test_a_recipe_needs_little(tmp_path: Path) -> None:
    """What it does not say has the defaults."""
    recipe = load_text(RECIPE, tmp_path)
    assert recipe.model.architecture == "Tiny-ViT"
    assert recipe.data.path == Path("data/shapes")
    assert (recipe.data.train_split, recipe.data.context_length) == ("train", 52)
    assert (recipe.valid.split, recipe.valid_path) == ("valid", Path("data/shapes"))
    assert recipe.data.all_sources == (Source(path="data/shapes"),)
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
    """Without a warning, into a folder of their own, which is git-ignored as their data are."""
    recipe = load_recipe(path)
    assert recipe.warnings == []
    assert recipe.run.out == Path("runs") / path.stem
    assert recipe.valid_path is not None
    assert recipe.valid_path.parts[0] == "data"


# Of Chinese-CLIP's notebook (muge) and run_scripts/: processes x batch size, lr, weight decay, warm-up steps, epochs.
PUBLISHED = {
    "muge": (48, 3e-6, 0.001, 100, 1),
    "flickr30k_cn": (8 * 128, 5e-5, 0.001, 100, 3),
    "coco_cn": (8 * 1024, 3e-5, 0.001, 6, 20),
    "muge_flip": (8 * 128, 5e-5, 0.001, 100, 3),
    "muge_distill": (8 * 128, 5e-5, 0.001, 100, 3),
    "muge_gradcache": (8 * 128, 5e-5, 0.001, 100, 3),
    "muge_frozen_vision": (8 * 128, 5e-5, 0.001, 100, 3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fine_tuning_has_the_published_figures(name: str) -> None:
    recipe = load_recipe(RECIPES_DIR / f"{name}.toml")
    optim = recipe.optim
    figures = (optim.batch_size, recipe.lr, optim.weight_decay, optim.warmup_steps, optim.epochs)
    assert figures == PUBLISHED[name]
    assert (recipe.model.architecture, recipe.data.unit, recipe.data.context_length) == ("ViT-B-16", "pair", 52)
    assert recipe.augment.crop_area == (0.9, 1.0)


def test_each_feature_has_a_recipe() -> None:
    """And has it on."""
    flip, distill, cached, frozen = (
        load_recipe(RECIPES_DIR / f"muge_{name}.toml") for name in ("flip", "distill", "gradcache", "frozen_vision")
    )
    assert flip.model.mask_ratio == 0.5
    assert distill.distill.is_on
    assert cached.optim.chunk_size < cached.optim.batch_size
    assert frozen.model.freeze_vision
    assert not frozen.model.freeze_text


@pytest.mark.parametrize(
    ("architecture", "lr", "betas", "eps"),
    [
        ("RN50", 5e-4, (0.9, 0.999), 1e-8),
        ("ViT-B-16", 5e-4, (0.9, 0.98), 1e-6),
        ("ViT-L-14", 4e-4, (0.9, 0.98), 1e-6),
        ("ViT-L-14-336", 4e-4, (0.9, 0.98), 1e-6),
        ("ViT-H-14", 5e-4, (0.9, 0.98), 1e-6),
    ],
)
def test_rates_are_the_published_ones_unless_given(
    architecture: str, lr: float, betas: tuple[float, float], eps: float, tmp_path: Path
) -> None:
    """cn_clip/training/params.py, get_default_params."""
    text = RECIPE.replace("Tiny-ViT", architecture).replace("lr = 1e-3\n", "")
    recipe = load_text(text, tmp_path)
    assert (recipe.lr, recipe.betas, recipe.eps) == (lr, betas, eps)
    given = load_text(text, tmp_path, "optim.lr=1e-5", "optim.betas=[0.8, 0.9]", "optim.eps=1e-7")
    assert (given.lr, given.betas, given.eps) == (1e-5, (0.8, 0.9), 1e-7)


# --- what is wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        ("rotate_degrees = 10", "rotate_degres = 10", "augment.rotate_degres: unknown key; known are crop_area, "),
        ("[augment]", "[agument]", "agument: unknown key; known are model, data, optim, loss, augment, engine, "),
        ("epochs = 2", "epochs = 0", "optim.epochs: Input should be greater than or equal to 1"),
        ("epochs = 2", 'epochs = "two"', "optim.epochs: Input should be a valid integer"),
        ("batch_size = 8", "batch_size = 1", "optim.batch_size: Input should be greater than or equal to 2"),
        ("lr = 1e-3", "lr = nan", "optim.lr: Input should be a finite number"),
        ("lr = 1e-3", "lr = inf", "optim.lr: Input should be a finite number"),
        ("batch_size = 8", "", "optim.batch_size: Field required"),
        ("epochs = 2", "", "optim: give epochs or max_steps"),
        ("batch_size = 8", "batch_size = 8\nchunk_size = 9", "optim: chunk_size 9 is above batch_size 8"),
        ("lr = 1e-3", "lr = 1e-3\nbetas = [0.9, 1.5]", "optim.betas.1: Input should be less than 1"),
        ("rotate_degrees = 10", "rotate_degrees = 270", "augment.rotate_degrees: Input should be less than or equal"),
        ("rotate_degrees = 10", "min_scale = 2", "augment: min_scale 2.0 is above max_scale 1.0"),
        (
            "rotate_degrees = 10",
            "crop_area = [0.0, 1.0]",
            "augment: crop_area is [0.0, 1.0], expected [from, to] within",
        ),
        (
            "rotate_degrees = 10",
            "crop_area = [0.9, 0.5]",
            "augment: crop_area is [0.9, 0.5], expected [from, to] within",
        ),
        ('path = "data/shapes"', 'path = "x"\ncontext_length = 2', "data.context_length: Input should be greater"),
        ('path = "data/shapes"', 'path = "x"\ncontext_length = 999', "data.context_length is 999, Tiny-ViT has "),
        (
            'path = "data/shapes"',
            'path = "x"\nshards = "y"',
            "data: give one of path, sources and shards; got path, sh",
        ),
        ('path = "data/shapes"', "", "data: give one of path, sources and shards; got none"),
        ('path = "data/shapes"', 'shards = "y"', 'data: shards hold pairs: set unit = "pair"'),
        ('path = "data/shapes"', 'shards = "y"\nunit = "pair"', "valid.path: name the validation pairs, or do without"),
        (
            'path = "data/shapes"',
            'path = "x"\nunit = "pair"\ncaptions_per_image = 2',
            "data: captions_per_image is for",
        ),
        (
            'path = "data/shapes"',
            'sources = [{path = "x", weight = 0}]',
            "data.sources.0.weight: Input should be greater",
        ),
        (
            "[augment]",
            '[engine]\nprecision = "amp"\n[augment]',
            "engine.precision: Input should be 'fp32', 'bf16' or 'fp1",
        ),
        ("[augment]", '[distill]\nteacher = "x"\n[augment]', "distill: give a teacher (or its features) and feature_w"),
        (
            "[augment]",
            "[distill]\nlogit_weight = 1\n[augment]",
            "distill: give a teacher (or its features) and feature",
        ),
        ('"Tiny-ViT"', '"Tiny-RN"\nmask_ratio = 0.5', "model: mask_ratio leaves out patches, and Tiny-RN has none"),
        ('"Tiny-ViT"', '"RN50"\ninit_checkpoint = "x"\ninit_text = "y"', "model: init_checkpoint has both towers"),
        ("Tiny-ViT", "ViT-B-61", "model.architecture: architecture 'ViT-B-61' is unknown; known are RN50"),
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


# --- overrides ----------------------------------------------------------------------------------------------------


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    """Values as in TOML, bare words as strings; the last of several wins; the file itself stays."""
    recipe = load_text(
        RECIPE, tmp_path, "optim.lr=1e-5", "augment.crop_area=[0.9, 1]", "run.out=runs/a b", "data.train_split = val",
        "engine.compile=true", "run.seed=1", "run.seed=2", 'data.path="d=e"', "valid.split=",
    )  # fmt: skip
    assert recipe.optim.lr == 1e-5
    assert recipe.augment.crop_area == (0.9, 1.0)
    assert recipe.augment.rotate_degrees == 10  # of the file
    assert recipe.run.out == Path("runs/a b")
    assert recipe.data.train_split == "val"
    assert recipe.engine.compile is True
    assert recipe.run.seed == 2
    assert recipe.data.path == Path("d=e")
    assert recipe.valid.split == ""
    assert recipe.valid_path is None
    assert load_recipe(tmp_path / "recipe.toml").optim.lr == 1e-3


def test_an_override_takes_a_value_away(tmp_path: Path) -> None:
    """TOML has no word for it; in quotes it is the word."""
    text = RECIPE.replace('"Tiny-ViT"', '"Tiny-ViT"\ninit_checkpoint = "x"')
    assert load_text(text, tmp_path).model.init_checkpoint == Path("x")
    assert load_text(text, tmp_path, "model.init_checkpoint=none").model.init_checkpoint is None
    assert load_text(text, tmp_path, 'model.init_checkpoint="none"').model.init_checkpoint == Path("none")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optim.batch_size=none", "recipe.toml: optim.batch_size: Input should be a valid integer"),
        ("optim.lr", "--set optim.lr: expected section.key=value, as optim.lr=1e-5"),
        ("lr=1", "--set lr=1: expected section.key=value"),
        ("optim.=1", "--set optim.=1: expected section.key=value"),
        ("optim.lr.x=1", "--set optim.lr.x=1: expected section.key=value"),
        ("optim.rate=1", "recipe.toml: optim.rate: unknown key; known are epochs, max_steps, batch_size,"),
        ("optimizer.lr=1", "recipe.toml: optimizer: unknown key; known are model, data,"),
        ("optim.lr=fast", "recipe.toml: optim.lr: Input should be a valid number"),
        ("optim.epochs=1.5", "recipe.toml: optim.epochs: Input should be a valid integer"),
    ],
)
def test_a_wrong_override_is_one_sentence(override: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=re.escape(reason)) as caught:
        load_text(RECIPE, tmp_path, override)
    assert "\n" not in str(caught.value)


def test_a_section_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("optim = 3\n")
    with pytest.raises(InvalidInput, match=r"--set optim\.lr=1: optim is not a section$"):
        load_recipe(tmp_path / "recipe.toml", ["optim.lr=1"])


# --- warnings -----------------------------------------------------------------------------------------------------

TRAINED = RECIPE.replace('"Tiny-ViT"', '"ViT-B-16"\ninit_checkpoint = "x.pt"')


@pytest.mark.parametrize(("lr", "warns"), [("1e-4", False), ("3e-6", False), ("5e-4", True), ("", True)])
def test_a_pre_training_rate_for_trained_weights_is_warned_of(lr: str, warns: bool, tmp_path: Path) -> None:
    """Without lr it is the architecture's, which is for pre-training."""
    text = TRAINED.replace("lr = 1e-3", f"lr = {lr}" if lr else "")
    found = load_text(text, tmp_path).warnings
    assert [bool(re.search(r"optim.lr is 0\.0005 .*3e-6 to 5e-5", one)) for one in found] == [True] * warns


def test_other_runs_are_not_warned_of(tmp_path: Path) -> None:
    """From scratch, and of the tiny models, whose rates are higher."""
    scratch = load_text(RECIPE.replace("Tiny-ViT", "ViT-B-16"), tmp_path)
    tiny = load_text(RECIPE, tmp_path, "model.init_checkpoint=x.pt")
    assert scratch.warnings == tiny.warnings == []


def test_a_loss_whose_gradient_is_not_exact_is_warned_of(tmp_path: Path) -> None:
    found = load_text(RECIPE, tmp_path, "loss.gather_with_grad=false").warnings
    assert len(found) == 1
    assert "the gradient is not exact" in found[0]
    assert load_text(RECIPE, tmp_path, "loss.gather_with_grad=false", "loss.local_loss=false").warnings == []
