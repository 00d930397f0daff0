"""`tuwen search`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tuwen.cli.console import DEFAULT_REPOSITORY, Json, Repository, Url, progress_bar, stderr, stdout

if TYPE_CHECKING:
    from tuwen_client.search import Picture

    from tuwen.serving.server import Endpoints


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

    pictures = gallery(images)
    skipped: list[InvalidInput] = []
    with embedded_server(repository) if start_server else nullcontext() as started:
        with Client(started.grpc if started else url, model) as client, progress_bar("embedding pictures") as report:
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


def gallery(path: Path) -> list[Picture]:
    """Pictures of a folder, named by path; or of a TSV, named by their captions where a JSONL lies beside it."""
    from tuwen_client.search import Picture, read_folder

    from tuwen.data.pairs import iter_images

    if path.suffix != ".tsv":
        return read_folder(path)
    names = captions_of(path)
    return [Picture(names.get(one.image_id, str(one.image_id)), one.encoded) for one in iter_images(path)]


def captions_of(path: Path) -> dict[int, str]:
    """By image id, the caption that describes fewest others, the first of such; none without a TSV and its JSONL."""
    from tuwen.data.pairs import iter_texts

    texts_path = path.with_name(path.name.replace("_imgs.tsv", "_texts.jsonl"))
    if path.suffix != ".tsv" or not texts_path.is_file():
        return {}
    by_reach = sorted(reversed(list(iter_texts(texts_path))), key=lambda text: -len(text.image_ids))
    return {image_id: text.text for text in by_reach for image_id in text.image_ids}  # the later in this order wins


@contextmanager
def embedded_server(repository: Path) -> Iterator[Endpoints]:
    """The embedded server on free ports of loopback."""
    from tuwen.serving.model_repository import TUNED_CONFIG
    from tuwen.serving.ports import free_ports
    from tuwen.serving.server import EmbeddedServer

    grpc_port, http_port, metrics_port = free_ports(3)
    server = EmbeddedServer(
        repository,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        cache_size_bytes=0,  # nothing is asked twice, or all is to be measured
        model_config_name=TUNED_CONFIG,
    )
    try:
        with stderr.status("starting Triton"):
            endpoints = server.start()
        yield endpoints
    finally:
        server.stop(timeout_s=0)  # nobody else has asked it anything
