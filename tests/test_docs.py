"""What the documents say can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from tuwen.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "Makefile",
    *ROOT.glob("samples/*/README.md"),
]


def commands() -> list[str]:
    """Every `tuwen ...` line of a code block, of a Makefile rule, or of inline code that has arguments."""
    found = []
    for document in DOCUMENTS:
        text = (
            document.read_text(encoding="utf-8").replace("\\\n", " ").replace("$(BIN)/", "").replace("$(QUERIES)", "猫")
        )
        found += re.findall(r"^\s*(tuwen [a-z][^\n#&|]*)", text, flags=re.MULTILINE)
        found += [command for command in re.findall(r"`(tuwen [^`\n]+)`", text) if "..." not in command]
    return sorted({command.strip() for command in found})


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_parses(command: str) -> None:
    """Command, arguments and option names exist; nothing is run."""
    group: click.Command = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    context = click.Context(group)
    while isinstance(group, click.Group) and words and not words[0].startswith("-"):
        child = group.get_command(context, words[0])
        assert child is not None, f"no command {words[0]!r}"
        group, words, context = child, words[1:], click.Context(child, parent=context)
    if isinstance(group, click.Group):
        return
    group.make_parser(context).parse_args(args=words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target
