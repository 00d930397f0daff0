"""What the documents say can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

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
    # Told by what it can do: some versions of typer bring a click of their own, which is not the installed one.
    group: Any = typer.main.get_command(app)
    assert hasattr(group, "get_command")
    words = shlex.split(command)[1:]
    context = group.context_class(group)
    while hasattr(group, "get_command") and words and not words[0].startswith("-"):
        child = group.get_command(context, words[0])
        assert child is not None, f"no command {words[0]!r}"
        group, words, context = child, words[1:], child.context_class(child, parent=context)
    if hasattr(group, "get_command"):
        assert not words, f"no option {words[0]!r} of a group"
        return
    if words and words[-1].startswith("--"):  # an option is mentioned, `tuwen build --name`, without its value
        words.append("1")
    group.make_parser(context).parse_args(args=words)


def test_a_command_that_is_not_there_is_noticed() -> None:
    """Else the test above might check nothing."""
    for command in ("tuwen nonsense", "tuwen data nonsense", "tuwen train --nonsense"):
        with pytest.raises(Exception, match="nonsense"):
            test_a_documented_command_parses(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target
