"""The README.md of a result: what it says, what it does not give away, and that odd names do not break it."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.records import validation_record
from training.model_card import RunSummary, escape, render_model_card
from training.recipe import Recipe, load_recipe

SUMMARY = RunSummary(
    step=1200, num_steps=2800, epoch=43, loss=1.25, elapsed_s=3725, samples_per_s=812.4, num_processes=2,
    device_name="NVIDIA H100", validation=validation_record(1200, r1=0.5),
)  # fmt: skip
RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.toml"))


def recipe_for(**changes: dict[str, object]) -> Recipe:
    sections: dict[str, dict[str, object]] = {
        "model": {"architecture": "Tiny-RN"},
        "data": {"path": "data/shapes"},
        "optim": {"epochs": 100, "batch_size": 128, "lr": 1e-5},
        "run": {"out": "runs/shapes"},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return Recipe.model_validate(sections)


def recipe_in(card: str) -> dict[str, object]:
    block = re.search(r"^(`{3,})toml\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    assert block is not None
    return tomllib.loads(block.group(2))


def row(card: str, name: str) -> list[str]:
    """The cells of a table's row."""
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def test_it_tells_what_the_weights_are() -> None:
    card = render_model_card(recipe_for(), SUMMARY)
    assert card.startswith("# Tiny-RN: shapes\n")
    assert row(card, "weights") == ["of the last step, 1200 of 2800, not finished"]
    assert row(card, "started from") == ["image tower: random, text tower: random"]
    assert row(card, "data") == ["data/shapes, split train"]
    assert row(card, "epoch") == ["43"]
    assert row(card, "pictures a step") == ["128"]
    assert row(card, "learning rate") == ["1e-05, cosine, after 500 steps of warm-up"]
    assert row(card, "loss") == ["contrastive, 1.2500"]
    assert row(card, "time") == ["1:02:05"]
    assert row(card, "throughput") == ["812 pictures/s"]
    assert row(card, "processes") == ["2 on NVIDIA H100, fp32"]
    assert re.fullmatch(r"tuwen \S+, torch \d\S+", row(card, "versions")[0])
    assert "| teacher |" not in card


def test_it_tells_the_validation() -> None:
    card = render_model_card(recipe_for(), replace(SUMMARY, validation=validation_record(1200, 0.5, 0.375)))
    assert row(card, "step 1200") == ["R@1", "R@5", "R@10", "mean", "queries"]
    assert row(card, "text to image") == ["50.0%", "50.0%", "75.0%", "58.3%", "5942"]
    assert row(card, "image to text") == ["12.5%", "37.5%", "62.5%", "37.5%", "1852"]
    assert "Mean recall of both directions: 47.9%. Zero-shot accuracy: 37.5%." in card
    assert "tuwen build --checkpoint runs/shapes\n" in card
    assert "tuwen eval retrieval --checkpoint runs/shapes --data data/shapes --split valid\n" in card


def test_without_a_validation_there_is_no_table() -> None:
    """Nor a command that could not run."""
    card = render_model_card(recipe_for(valid={"split": ""}), replace(SUMMARY, validation=None))
    assert "Validation" not in card
    assert "tuwen eval" not in card
    assert "tuwen build" in card


def test_it_tells_best_average_teacher_and_first_weights() -> None:
    recipe = recipe_for(
        optim={"ema_decay": 0.999},
        model={"init_vision": "clip/vision.pt"},
        distill={"teacher": "runs/teacher", "logit_weight": 1.0},
    )
    # The best of a finished run may be in its middle.
    card = render_model_card(recipe, replace(SUMMARY, step=1200, is_best=True))
    assert row(card, "weights") == [
        "of the best validation, 1200 of 2800; a moving average of the weights, decay 0.999"
    ]
    assert row(card, "teacher") == ["runs/teacher"]
    assert row(card, "started from") == ["image tower: clip/vision.pt, text tower: random"]
    from_checkpoint = render_model_card(recipe_for(model={"init_checkpoint": "ViT.pt"}), SUMMARY)
    assert row(from_checkpoint, "started from") == ["ViT.pt"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_recipe_is_the_one_that_ran(path: Path) -> None:
    """With relative paths it reads back as the same."""
    recipe = load_recipe(path)
    assert Recipe.model_validate(recipe_in(render_model_card(recipe, SUMMARY))) == recipe


def test_every_kind_of_value_reads_back() -> None:
    """Strings with quotes and newlines, lists of tables, flags, small numbers."""
    recipe = recipe_for(
        data={
            "path": None,
            "sources": [{"path": "a b", "weight": 2}, {"path": 'c"d\\e\nf'}],
            "distinct_captions": True,
        },
        optim={"betas": [0.9, 0.98], "eps": 1e-6},
        valid={"path": "图文/猫"},
        run={"wandb_project": "```\n# no heading"},
    )
    assert Recipe.model_validate(recipe_in(render_model_card(recipe, SUMMARY))) == recipe


def test_paths_outside_the_working_folder_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they stand; those inside are relative, however they were given."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    recipe = recipe_for(
        model={"init_checkpoint": "/home/somebody/secret/weights/first.pt"},
        data={"path": None, "sources": [{"path": "/home/somebody/secret/sets/one"}, {"path": work / "data" / "two"}]},
        valid={"path": "../outside/sets/three", "zero_shot": "/home/somebody/secret/classes/four"},
        distill={"teacher": "/home/somebody/secret/runs/five", "logit_weight": 1.0},
        run={"out": work / "runs" / "six"},
    )
    card = render_model_card(recipe, SUMMARY)
    for private in ("somebody", "secret", str(tmp_path), tmp_path.name, "outside", "/home"):
        assert private not in card
    assert row(card, "started from") == ["…/weights/first.pt"]
    assert row(card, "data") == ["…/sets/one, data/two, split train"]
    assert "--checkpoint runs/six --data '…/sets/three'" in card
    shown = recipe_in(card)
    assert shown["valid"] == {"path": "…/sets/three", "zero_shot": "…/classes/four"}
    assert shown["run"] == {"out": "runs/six"}
    shards = recipe_for(data={"path": None, "shards": "/home/somebody/secret/sets/*.tsv", "unit": "pair"},
                        valid={"split": ""})  # fmt: skip
    assert row(render_model_card(shards, SUMMARY), "data") == [r"…/sets/\*.tsv"]
    assert "somebody" not in render_model_card(shards, SUMMARY)


def test_odd_names_stay_what_they_are() -> None:
    """A name with Markdown, HTML, a table's bar or a shell's quote in it makes nothing of itself."""
    odd = "a|b```c*d_e<script>[x](y)'; rm -rf"
    card = render_model_card(recipe_for(data={"path": odd}, run={"out": odd}), SUMMARY)
    assert row(card, "data") == [r"a\|b\`\`\`c\*d\_e\<script\>\[x\](y)'; rm -rf, split train"]
    block = re.search(r"^(`{4,})\n(.*?)^\1$", card, re.DOTALL | re.MULTILINE)
    assert block is not None
    build, evaluate = block.group(2).splitlines()
    assert shlex.split(build) == ["tuwen", "build", "--checkpoint", odd]
    assert shlex.split(evaluate)[3:] == ["--checkpoint", odd, "--data", odd, "--split", "valid"]
    assert card.count("\n## ") == 4  # no heading more
    assert escape("two\nlines  of it") == "two lines of it"


def test_a_name_that_is_no_unicode_does_not_cost_the_result() -> None:
    """Linux allows any bytes in a name; Python shows them as lone surrogates, which UTF-8 has not."""
    card = render_model_card(recipe_for(data={"path": "data/\udcff"}), SUMMARY)
    assert row(card, "data") == ["data/?, split train"]
    card.encode()
