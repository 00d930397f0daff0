"""`tuwen eval zero-shot`: options, what is printed, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from eval.class_folders import read_class_folders
from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import COLOURS, SHAPES, draw_shape
from tuwen.checkpoint import save_checkpoint
from tuwen.cli import app
from tuwen.scoring import load_classifier

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(random_model(SMALL_SPECS["vit"]), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10"
    for number, colour in enumerate(COLOURS):
        (folder / "test" / str(number)).mkdir(parents=True)
        for shape in SHAPES:
            (folder / "test" / str(number) / f"{shape}.png").write_bytes(draw_shape(colour, shape))
    (folder / "label_cn.txt").write_text("".join(f"{colour}色\n" for colour in COLOURS), encoding="utf-8")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", "zero-shot", *map(str, arguments)])


def test_a_table_and_json_of_the_same(data: Path, checkpoint: Path) -> None:
    result = run("--data", data, "--checkpoint", checkpoint, "--json")
    found = json.loads(result.stdout)
    assert (found["task"], found["metric"], found["num_images"], found["model_name"]) == (
        "cifar-10", "accuracy", 20, "Small-ViT",
    )  # fmt: skip
    assert found["published"] is None
    table = run("--data", data, "--checkpoint", checkpoint).stdout
    assert f"{found['score']:.1%}" in table
    assert "CIFAR-10" in table


def test_the_published_figure_stands_beside_ours(data: Path, tmp_path: Path) -> None:
    """A model of a published architecture's name; its size does not matter here."""
    from dataclasses import replace

    save_checkpoint(random_model(replace(SMALL_SPECS["vit"], name="ViT-B-16")), tmp_path / "b16")
    table = run("--data", data, "--checkpoint", tmp_path / "b16").stdout
    assert "published ViT-B-16" in table
    assert "92.0%" in table
    other = run("--data", data, "--checkpoint", tmp_path / "b16", "--task", "eurosat-clip")
    assert "46.9%" in other.stdout
    assert "EuroSAT" in other.stdout


def test_a_classifier_is_stored_and_used_again(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "classifiers" / "colours.safetensors"
    first = run("--data", data, "--checkpoint", checkpoint, "--save-classifier", path, "--json")
    assert load_classifier(path).labels == read_class_folders(data).labels
    again = run("--data", data, "--checkpoint", checkpoint, "--classifier", path, "--json")
    assert json.loads(again.stdout) == json.loads(first.stdout)
    both = run("--data", data, "--checkpoint", checkpoint, "--classifier", path, "--save-classifier", path)
    assert both.exit_code == 2


def test_a_submission_in_the_order_of_index_json(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    order = list(range(19, -1, -1))
    plain, turned = tmp_path / "plain.json", tmp_path / "turned.json"
    run("--data", data, "--checkpoint", checkpoint, "--submission", plain)
    (data / "index.json").write_text(json.dumps(order))
    run("--data", data, "--checkpoint", checkpoint, "--submission", turned)
    written = json.loads(plain.read_text())
    assert (written["dataset_name"], written["model_name"], written["n_shot"]) == ("cifar-10", "Tuwen-Small-ViT", 0)
    assert written["num_params"] > written["num_visual_params"] > 0
    assert json.loads(turned.read_text())["predictions"][0] == written["predictions"][0][::-1]


def test_a_report_shows_the_confusion(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("--data", data, "--checkpoint", checkpoint, "--report", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "红色" in page
    assert "top-1 accuracy" in page


def test_unreadable_pictures_are_named(data: Path, checkpoint: Path) -> None:
    (data / "test" / "2" / "broken.png").write_bytes(b"no picture")
    result = run("--data", data, "--checkpoint", checkpoint)
    assert "1 pictures could not be read" in result.stderr
    assert "2/broken.png: " in result.stderr


def test_a_folder_of_another_name_is_asked_in_general(data: Path, checkpoint: Path) -> None:
    other = data.rename(data.with_name("colours"))
    found = json.loads(run("--data", other, "--checkpoint", checkpoint, "--json").stdout)
    assert (found["task"], found["metric"]) == ("colours", "accuracy")


def test_wrong_usage(data: Path, checkpoint: Path) -> None:
    assert run("--data", data).exit_code == 2
    unknown = run("--data", data, "--checkpoint", checkpoint, "--task", "fruit")
    assert unknown.exit_code == 1
    assert "task 'fruit' is unknown; known are caltech-101" in str(unknown.exception)
