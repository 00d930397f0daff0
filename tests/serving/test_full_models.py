"""Full models tell those before them; a step refuses early only when nobody behind it has room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuwen.serving.full_models import FOLDER, FullFlag, are_all_full


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_side_is_full_when_all_its_models_are() -> None:
    assert not are_all_full("text")
    one, two, image = FullFlag("text", "a_text_tower"), FullFlag("text", "b_text_tower"), FullFlag("image", "a")
    one.tell(lambda: True)
    image.tell(lambda: True)
    assert not are_all_full("text")
    two.tell(lambda: True)
    two.tell(lambda: True)
    assert are_all_full("text")
    one.tell(lambda: False)
    assert not are_all_full("text")
    assert are_all_full("image")


def test_a_model_that_is_gone_or_new_says_so() -> None:
    flag = FullFlag("text", "a")
    flag.tell(lambda: True)
    FullFlag("text", "a")  # its successor, after a kill
    assert [path.name for path in FOLDER.iterdir()] == ["text.a.open"]
    flag.remove()
    assert not are_all_full("text")
    assert not list(FOLDER.iterdir())
