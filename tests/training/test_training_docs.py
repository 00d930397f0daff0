"""docs/training.md has every key of a recipe and every flag of Chinese-CLIP's trainer, and none that is not there."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from training.recipe import Recipe, Section, Source

DOCS = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
SECTIONS: dict[str, type[Section]] = {
    **{f"[{name}]": field.annotation for name, field in Recipe.model_fields.items()},
    "[[data.sources]]": Source,
}
KEYS = {f"{name}.{key}" for name, field in Recipe.model_fields.items() for key in field.annotation.model_fields}


def rows(text: str) -> list[list[str]]:
    """The cells of the table rows in `text`, without heads and rules."""
    tables = re.findall(r"^\|.*\n\|[-|]+\n((?:\|.*\n)*)", text, flags=re.MULTILINE)
    lines = [line for table in tables for line in table.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def section_text(heading: str) -> str:
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", DOCS, flags=re.MULTILINE | re.DOTALL)
    assert found, f"docs/training.md has no section {heading}"
    return found[1]


def printed(default: Any) -> str:
    return "none" if default is None else json.dumps(default)


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_is_there_with_its_default(heading: str) -> None:
    fields = SECTIONS[heading].model_fields
    expected = {
        f"`{key}`": "required" if field.is_required() else printed(field.default) for key, field in fields.items()
    }
    table = rows(section_text(heading))
    assert len(table) == len(fields)
    assert {row[0]: row[1] for row in table} == expected


def test_a_key_in_the_text_is_one() -> None:
    """`section.key`, wherever it stands, and what `--set` sets."""
    sections = "|".join(Recipe.model_fields)
    named = set(re.findall(rf"(?:`|--set )((?:{sections})\.[a-z_]+)", DOCS))
    assert len(named) > 40
    assert named - KEYS == set()


# --- Chinese-CLIP's flags -----------------------------------------------------------------------------------------


def published_flags() -> set[str]:
    """Of cn_clip's parser, read and not run: it would import torchvision."""
    package = importlib.util.find_spec("cn_clip")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs cn-clip: make lint installs it")
    path = Path(package.submodule_search_locations[0]) / "training" / "params.py"
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    return {argument.value for call in added for argument in call.args if isinstance(argument, ast.Constant)}


def test_every_flag_is_there() -> None:
    table = rows(section_text("Coming from Chinese-CLIP"))
    documented = [row[0].strip("`") for row in table if row[0].startswith("`--")]
    assert len(documented) == len(set(documented))
    assert len(documented) > 40
    assert set(documented) == published_flags()


def test_every_flag_has_a_key_or_a_reason() -> None:
    for flag, here in (row for row in rows(section_text("Coming from Chinese-CLIP")) if row[0].startswith("`--")):
        named = re.findall(r"`([a-z]+\.[a-z_]+)", here)
        assert set(named) <= KEYS, flag
        assert named or re.match(r"not needed, because \w+", here), flag


def test_the_recipes_are_listed() -> None:
    folder = Path(__file__).parents[2] / "training" / "recipes"
    listed = set(re.findall(r"\.\./training/recipes/(\w+)\.toml", DOCS))
    assert listed == {path.stem for path in folder.glob("*.toml")}
