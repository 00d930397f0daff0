"""`tuwen ...`: one Typer app. A command is a thin call into a package, imported when the command runs.

stdout is the result, stderr the log and the progress. Exit 0 done, 1 failed with one sentence, 2 wrong usage.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from tuwen_client.search import Picture

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

# No emoji codes: ":smile:" in a caption or an error stays what it is.
stdout, stderr = Console(emoji=False), Console(stderr=True, emoji=False, highlight=False)


class ProgressHook(Protocol):
    def __call__(self, done: int, total: int, what: str = "") -> None: ...


Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Data = Annotated[Path, typer.Option("--data", help="Folder of an LMDB, or of TSV and JSONL files.")]
Checkpoint = Annotated[Path, typer.Option("--checkpoint", help="Checkpoint folder, or an official .pt file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Repository = Annotated[Path, typer.Option("--repository", help="The Triton model repository.")]
Url = Annotated[str, typer.Option("--url", help="gRPC address of the server.")]

DEFAULT_REPOSITORY = Path("model_repository")


def main() -> None:
    """Entry point: our own errors become one sentence; anything else is a bug and keeps its traceback."""
    handler = RichHandler(console=stderr, show_time=False, show_level=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        app()
    except Exception as error:
        if not _is_ours(error):
            raise
        stderr.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


def _is_ours(error: Exception) -> bool:
    """The library's errors, and the client's, which has a base class of its own and the same name."""
    return any(base.__name__ == "TuwenError" for base in type(error).__mro__)


@contextmanager
def progress_bar(description: str) -> Iterator[ProgressHook]:
    """A bar on stderr; call what is yielded with (done, total, what is going on); a total of 0 means unknown."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(description, total=None)

        def report(done: int, total: int, what: str = "") -> None:
            progress.update(task, completed=done, total=total or None, description=f"{description} {what}".rstrip())

        yield report


# --- from data to a model --------------------------------------------------------------------------------------


@data_app.command("emoji")
def data_emoji(
    out: Out = Path("data/emoji_cn"),
    packages: Annotated[Path, typer.Option("--packages", help="Where the npm packages lie, or are fetched to.")] = Path(
        ".cache/npm"
    ),
) -> None:
    """Make Emoji-CN: 1,852 emoji with Chinese names and tags, in three styles, one held out for validation."""
    from tuwen.data.emoji_cn import build_emoji_cn

    with progress_bar("emoji") as report:
        counts = build_emoji_cn(out, packages, on_progress=report)
    for split, count in counts.items():
        stdout.print(f"{out}/{split}_imgs.tsv, {split}_texts.jsonl: {count} pictures", soft_wrap=True)


@data_app.command("lmdb")
def data_lmdb(
    data: Data,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; default DATA/lmdb.")] = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="Which split; again for more; default all.")
    ] = None,
) -> None:
    """Pack TSV and JSONL files in Chinese-CLIP's LMDB layout."""
    from tuwen.data.lmdb import write_lmdb
    from tuwen.data.pairs import tsv_splits
    from tuwen.errors import InvalidInput

    splits = split or tsv_splits(data)
    if not splits:
        raise InvalidInput(f"{data}: no *_imgs.tsv in it; see docs/formats.md")
    for name in splits:
        with progress_bar(f"{name}") as report:
            written = write_lmdb(data, name, out, report)
        stdout.print(written)


@app.command()
def train(recipe: Annotated[Path, typer.Argument(help="A TOML recipe.")]) -> None:
    """Train from a recipe; prints the checkpoint folder."""
    from training.recipe import load_recipe
    from training.train import Progress as TrainingProgress
    from training.train import train as run_training

    loaded = load_recipe(recipe)
    with progress_bar("training") as report:

        def show(progress: TrainingProgress) -> None:
            state = f"loss {progress.loss:.3f}  recall@10 {progress.recall_at_10:.1%}"
            report(progress.step, progress.num_steps, state)

        out = run_training(loaded, show)
    stdout.print(out)


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
    name: Annotated[
        str | None, typer.Option("--name", help="Name to serve under; default: the architecture's.")
    ] = None,
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


# --- serving ---------------------------------------------------------------------------------------------------


@app.command()
def serve(
    repository: Repository = DEFAULT_REPOSITORY,
    model: Annotated[list[str] | None, typer.Option("--model", help="Triton model to load; default all built.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option("--grpc-port")] = 8001,
    http_port: Annotated[int, typer.Option("--http-port")] = 8000,
    metrics_port: Annotated[int, typer.Option("--metrics-port")] = 8002,
    log_file: Annotated[Path | None, typer.Option("--log-file", help="Keep Triton's log here.")] = None,
) -> None:
    """Serve what has been built with the embedded Triton, until Ctrl-C."""
    from tuwen.serving.server import EmbeddedServer

    server = EmbeddedServer(
        repository,
        models=model,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        log_path=log_file,
    )
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with stderr.status("starting Triton"):
            endpoints = server.start()
        stdout.print(f"gRPC     {endpoints.grpc}\nHTTP     {endpoints.http}\nmetrics  {endpoints.metrics}")
        stderr.print("ready; Ctrl-C stops it")
        server.wait()
    except KeyboardInterrupt:
        stderr.print("stopping")
    finally:
        server.stop()


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends `tuwen serve` as Ctrl-C does."""
    raise KeyboardInterrupt


@app.command()
def search(
    queries: Annotated[list[str], typer.Argument(help="Chinese queries.")],
    images: Annotated[Path, typer.Option("--images", help="Folder of pictures, or an *_imgs.tsv.")],
    url: Url = "localhost:8001",
    model: Annotated[str | None, typer.Option("--model", help="Which model, where several are served.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many matches of each query.")] = 8,
    sheet: Annotated[Path | None, typer.Option("--sheet", help="Draw the matches to this PNG.")] = None,
    start_server: Annotated[bool, typer.Option("--serve", help="Start the embedded server for this search.")] = False,
    repository: Repository = DEFAULT_REPOSITORY,
    as_json: Json = False,
) -> None:
    """Find the pictures that Chinese queries describe, through the server."""
    from tuwen_client import Client, InvalidInput
    from tuwen_client.search import contact_sheet, rank_pictures

    pictures = _gallery(images)
    skipped: list[InvalidInput] = []
    with _server(repository) if start_server else nullcontext(url) as address, Client(address, model) as client:
        with progress_bar("embedding pictures") as report:
            matches = rank_pictures(
                client, queries, pictures, top, lambda done: report(done, len(pictures)), skipped.append
            )
        served = client.model
    for error in skipped:
        name = pictures[error.index].name if error.index is not None else "a picture"
        stderr.print(f"skipped {escape(name)}: {escape(error.message)}", soft_wrap=True)
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(queries, matches).save(sheet)
        stderr.print(f"{sheet} shows the matches", soft_wrap=True)
    if as_json:
        found = {
            query: [{"name": match.picture.name, "cosine": match.cosine} for match in row]
            for query, row in zip(queries, matches, strict=True)
        }
        print(json.dumps(found, ensure_ascii=False))
        return
    table = Table(title=f"{len(pictures)} pictures, model {served}", show_lines=True)
    table.add_column("query", style="bold", no_wrap=True)
    table.add_column("best matches, with cosine")
    for query, row in zip(queries, matches, strict=True):
        table.add_row(
            escape(query), "  ".join(f"{escape(match.picture.name)} [dim]{match.cosine:.2f}[/dim]" for match in row)
        )
    stdout.print(table)


def _gallery(path: Path) -> list[Picture]:
    """Pictures of a folder, named by path; or of a TSV, named by their captions where a JSONL lies beside it."""
    from tuwen_client.search import Picture, read_folder

    from tuwen.data.pairs import iter_images, iter_texts

    if path.suffix != ".tsv":
        return read_folder(path)
    texts_path = path.with_name(path.name.replace("_imgs.tsv", "_texts.jsonl"))
    texts = list(iter_texts(texts_path)) if texts_path.is_file() else []
    # A picture's name is the caption that describes fewest others, the first of such: the later in this order wins.
    by_reach = sorted(reversed(texts), key=lambda text: -len(text.image_ids))
    captions = {image_id: text.text for text in by_reach for image_id in text.image_ids}
    return [Picture(captions.get(one.image_id, str(one.image_id)), one.encoded) for one in iter_images(path)]


@contextmanager
def _server(repository: Path) -> Iterator[str]:
    """The embedded server on free ports of loopback; yields its gRPC address."""
    from tuwen.serving.ports import free_ports
    from tuwen.serving.server import EmbeddedServer

    grpc_port, http_port, metrics_port = free_ports(3)
    server = EmbeddedServer(repository, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port)
    try:
        with stderr.status("starting Triton"):
            endpoints = server.start()
        yield endpoints.grpc
    finally:
        server.stop()


if __name__ == "__main__":
    main()
