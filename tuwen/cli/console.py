"""What all commands share: the two streams, the progress bar, and options that mean the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# No emoji codes: ":smile:" in a caption or an error stays what it is.
stdout, stderr = Console(emoji=False), Console(stderr=True, emoji=False, highlight=False)

Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Data = Annotated[Path, typer.Option("--data", help="Folder of an LMDB, or of TSV and JSONL files.")]
Checkpoint = Annotated[Path, typer.Option("--checkpoint", help="Checkpoint folder, or an official .pt file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Repository = Annotated[Path, typer.Option("--repository", help="The Triton model repository.")]
Url = Annotated[str, typer.Option("--url", help="gRPC address of the server.")]

DEFAULT_REPOSITORY = Path("model_repository")


class ProgressHook(Protocol):
    def __call__(self, done: int, total: int, what: str = "") -> None: ...


class _RateColumn(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed and task.speed < 1000 else f"{task.speed or 0:.0f}/s")


@contextmanager
def progress_bar(description: str) -> Iterator[ProgressHook]:
    """A bar on stderr; call what is yielded with (done, total, what is going on); a total of 0 means unknown."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(description, total=None)

        def report(done: int, total: int, what: str = "") -> None:
            progress.update(task, completed=done, total=total or None, description=f"{description} {what}".rstrip())

        yield report
