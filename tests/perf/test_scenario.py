"""Scenarios: those that are kept, and what a slip says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from perf.scenario import SCENARIOS_DIR, find_scenario, load_scenario
from tuwen.errors import InvalidInput

TEXT = (SCENARIOS_DIR / "text.toml").read_text(encoding="utf-8")
MIXED = (SCENARIOS_DIR / "mixed.toml").read_text(encoding="utf-8")


def load_text(text: str, folder: Path) -> None:
    (folder / "scenario.toml").write_text(text, encoding="utf-8")
    load_scenario(folder / "scenario.toml")


@pytest.mark.parametrize("path", sorted(SCENARIOS_DIR.glob("*.toml")), ids=lambda path: path.stem)
def test_a_kept_scenario_is_valid_and_named_as_its_file(path: Path) -> None:
    scenario, text = load_scenario(path)
    assert scenario.name == path.stem
    assert text == path.read_text(encoding="utf-8")


def test_the_three_kinds_are_kept() -> None:
    kinds = {load_scenario(path)[0].kind for path in SCENARIOS_DIR.glob("*.toml")}
    assert kinds == {"text", "image", "mixed"}


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        ("median_characters = 6", "median_chars = 6", "text.median_chars: unknown key"),
        ("count = 500", "count = 0", "text.count: Input should be greater than or equal to 1"),
        ('kind = "text"', 'kind = "txt"', "kind: Input should be 'text', 'image' or 'mixed'"),
        ('kind = "text"', 'kind = "mixed"', "a scenario of kind mixed needs a section [image]"),
        ('kind = "text"', 'kind = "image"', "a scenario of kind image sends no text; leave out [text]"),
        ("[load]", "[lode]", "load: Field required"),
        ("repeats = 3", "repeats = 3\nrates = [10]", "load: rates and capacity_fractions are two ways"),
        ("concurrencies = [1, 2,", "concurrencies = [2, 2,", "load: concurrencies names a level twice"),
        ("percentile = 95", "percentile = 96", "measure.percentile: Input should be 50, 90, 95 or 99"),
        ('name = "text"', 'name = "../text"', "name: String should match pattern"),
        ("[measure]", "[measure", "not valid TOML: "),
    ],
)
def test_a_slip_is_one_sentence(right: str, wrong: str, reason: str, tmp_path: Path) -> None:
    assert TEXT.count(right) == 1
    with pytest.raises(InvalidInput, match=rf"scenario\.toml: {re.escape(reason)}") as caught:
        load_text(TEXT.replace(right, wrong), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_mixed_load_has_one_request_of_either_kind(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="concurrencies of at least 2"):
        load_text(MIXED.replace("[4, 8, 16, 32]", "[1, 8]"), tmp_path)


def test_a_missing_scenario_names_those_that_are_kept(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"there is no such scenario; those kept are image, mixed, smoke, text$"):
        load_scenario(find_scenario(str(tmp_path / "nowhere")))


def test_a_file_goes_before_a_kept_scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_scenario("text") == SCENARIOS_DIR / "text.toml"
    (tmp_path / "text").touch()
    assert find_scenario("text") == Path("text")
