"""`tuwen ...`: one Typer app. A command is a thin call into a package, imported when the command runs.

stdout is the result, stderr the log and the progress. Exit 0 done, 1 failed with one sentence, 2 wrong usage.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(
    help="图文 Tuwen: train, evaluate, build and serve Chinese-CLIP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Make and pack image-text data.", no_args_is_help=True)
eval_app = typer.Typer(help="Measure a checkpoint.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")

stdout, stderr = Console(), Console(stderr=True)

Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Data = Annotated[Path, typer.Option("--data", help="Folder of an LMDB, or of TSV and JSONL files.")]
Checkpoint = Annotated[Path, typer.Option("--checkpoint", help="Checkpoint folder, or an official .pt file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Repository = Annotated[Path, typer.Option("--repository", help="The Triton model repository.")]
Url = Annotated[str, typer.Option("--url", help="gRPC address of the server.")]

DEFAULT_REPOSITORY = Path("model_repository")
SAMPLE_CHECKPOINT = Path("samples/emoji_tiny")
SAMPLE_DATA = Path("samples/emoji_cn")


def main() -> None:
    """Entry point: our own errors become one sentence; anything else is a bug and keeps its traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=stderr, show_path=False)])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        app()
    except Exception as error:
        if not _is_ours(error):
            raise
        stderr.print(f"[red]error:[/red] {_escape(str(error))}", soft_wrap=True)
        sys.exit(1)


def _is_ours(error: Exception) -> bool:
    """The library's errors, and the client's, which has a base class of its own and the same name."""
    return any(base.__name__ == "TuwenError" for base in type(error).__mro__)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; call the yielded function with (done, total); total 0 means unknown."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)


# --- data ---------------------------------------------------------------------------------------------------


@app.command()
def train(recipe: Annotated[Path, typer.Argument(help="A TOML recipe.")]) -> None:
    """Train from a recipe; prints the checkpoint folder."""
    from training.recipe import load_recipe
    from training.train import Progress as TrainingProgress
    from training.train import train as run_training

    loaded = load_recipe(recipe)
    with progress_bar("training") as report:

        def show(progress: TrainingProgress) -> None:
            report(progress.step, progress.num_steps)

        stdout.print(run_training(loaded, show))


@eval_app.command("retrieval")
def eval_retrieval(
    checkpoint: Checkpoint,
    data: Data,
    split: Annotated[str, typer.Option("--split", help="Which split of the data.")] = "valid",
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """R@1, R@5, R@10 and their mean, text to image and image to text."""
    from eval.retrieval import evaluate_checkpoint

    with progress_bar("embedding pictures") as report:
        result = evaluate_checkpoint(checkpoint, data, split, device, report)
    if as_json:
        print(json.dumps(result))
        return
    table = Table(title=f"{result['architecture']} on {data} ({split}, {result['num_images']} pictures)")
    for column in ("", "R@1", "R@5", "R@10", "mean", "queries"):
        table.add_column(column, justify="right" if column else "left")
    for direction in ("text_to_image", "image_to_text"):
        scores = result[direction]
        figures = (f"{scores[key]:.1%}" for key in ("r1", "r5", "r10", "mean_recall"))
        table.add_row(direction.replace("_", " "), *figures, str(scores["num_queries"]))
    stdout.print(table)


@app.command()
def build(
    checkpoint: Checkpoint,
    name: Annotated[str | None, typer.Option("--name", help="Name to serve under; default: the architecture's.")] = None,
    model_version: Annotated[int, typer.Option("--version", help="Version folder; new weights go beside the old.")] = 1,
    repository: Repository = DEFAULT_REPOSITORY,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to ONNX, check it against PyTorch, and place it in the model repository."""
    from builders.build import build as run_build

    with stderr.status("building") as status:
        result = run_build(checkpoint, name, repository, model_version, lambda stage: status.update(stage))
    if as_json:
        parity = {kind: vars(measured) for kind, measured in result.parity.items()}
        print(json.dumps({"name": result.name, "fingerprint": result.fingerprint, "parity_with_pytorch": parity}))
        return
    for kind, parity_of_tower in result.parity.items():
        stdout.print(
            f"{result.repository}/{result.name}_{kind}_tower/{result.version}: equals PyTorch to cosine "
            f"{parity_of_tower.min_cosine:.6f}, largest difference {parity_of_tower.max_abs_diff:.1e}",
            soft_wrap=True,
        )
    stdout.print(f"fingerprint {result.fingerprint}; now run: tuwen serve")


@app.command()
def render(
    check: Annotated[bool, typer.Option("--check", help="Only say what differs.")] = False,
    repository: Repository = DEFAULT_REPOSITORY,
) -> None:
    """Render the committed server configs from tuwen/specs.py."""
    from builders.repository import committed_files, drifted, write_rendered
    from tuwen.errors import InvalidInput

    if not check:
        for path in write_rendered(committed_files(), repository, overwrite=True):
            stdout.print(repository / path)
        return
    if paths := drifted(committed_files(), repository):
        raise InvalidInput(f"{repository}: {', '.join(map(str, paths))} differ from the specs; run `tuwen render`")


if __name__ == "__main__":
    main()
