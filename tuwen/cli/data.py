"""`tuwen data ...`: make, pack and check image-text data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tuwen.cli.console import Data, Json, Out, progress_bar, stdout
from tuwen.specs import CONTEXT_LENGTH

if TYPE_CHECKING:
    from tuwen.data.check import Report

data_app = typer.Typer(help="Make, pack and check image-text data.", no_args_is_help=True)

_HISTOGRAM_ROWS, _HISTOGRAM_WIDTH = 16, 40
_SHOWN_EXAMPLES, _MAX_SHOWN_CHARS = 3, 20


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


@data_app.command("shards")
def data_shards(
    data: Data,
    out: Out,
    split: Annotated[str, typer.Option("--split", help="Which split of the data.")] = "train",
    num_shards: Annotated[int, typer.Option("--shards", min=1, help="How many files to write.")] = 16,
) -> None:
    """Write pairs as shards, for sets too large to index in memory: shuffled, a pair a line."""
    from tuwen.data.shards import write_shards

    with progress_bar(split) as report:
        written = write_shards(data, split, out, num_shards, report)
    stdout.print(
        f'{written}: {num_shards} shards; in a recipe: data.shards = "{written}/*.tsv"', soft_wrap=True, markup=False
    )


@data_app.command("split")
def data_split(
    data: Data,
    split: Annotated[str, typer.Option("--split", help="Which split to part.")],
    into: Annotated[str, typer.Option("--into", help="Names of the two that it becomes, a comma between.")],
    share: Annotated[float, typer.Option("--share", min=0, max=1, help="Of the pictures, for the first.")] = 0.8,
) -> None:
    """Part a split in two, as for training and validation: by picture, always the same way."""
    from tuwen.data.split import split_pairs
    from tuwen.errors import InvalidInput

    names = into.split(",")
    if len(names) != 2:
        raise InvalidInput(f"--into {into}: expected two names with a comma between")
    with progress_bar(split) as report:
        parts = split_pairs(data, split, (names[0], names[1]), share, report)
    for part in parts:
        stdout.print(
            f"{data}/{part.name}_imgs.tsv, {part.name}_texts.jsonl: {part.num_pictures} pictures, {part.num_captions} "
            f"captions, {part.num_shared} of them in both",
            soft_wrap=True,
        )


@data_app.command("check")
def data_check(
    data: Data,
    split: Annotated[str, typer.Option("--split", help="Which split of the data.")] = "train",
    context_length: Annotated[
        int, typer.Option("--context-length", min=3, help="Tokens a caption is cut to.")
    ] = CONTEXT_LENGTH,
    num_workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Processes that decode; default: one a core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is off in a set: unreadable pictures, copies, empty, repeated and cut captions."""
    from tuwen.data.check import check_pairs

    with progress_bar(split) as report:
        result = check_pairs(data, split, context_length, num_workers, report)
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(result) | {"advice": result.advice}, ensure_ascii=False))
        return
    _print_findings(f"{data} ({split})", result)
    _print_lengths(result)
    for sentence in result.advice or ["Nothing is off."]:
        stdout.print(sentence, soft_wrap=True)


def _print_findings(name: str, result: Report) -> None:
    table = Table(
        title=escape(
            f"{name}: {result.num_pictures} pictures, {result.num_captions} captions, {result.num_pairs} pairs"
        )
    )
    for column in ("", "how many", "of all", "for example"):
        table.add_column(column, justify="right" if column in ("how many", "of all") else "left")

    def add(what: str, count: int, total: int, examples: Iterable[object]) -> None:
        shown = "; ".join(map(str, islice(examples, _SHOWN_EXAMPLES)))
        table.add_row(what, str(count), f"{count / max(1, total):.1%}", escape(shown))

    pictures, captions = result.num_pictures, result.num_captions
    unreadable = [f"{one.image_id}: {one.reason}" for one in result.unreadable.examples]
    add("pictures that cannot be read", result.unreadable.count, pictures, unreadable)
    for what, copies in (("copies of a file", result.same_file), ("copies of a picture", result.same_pixels)):
        add(what, copies.count, pictures, (" = ".join(map(str, ids[:_SHOWN_EXAMPLES])) for ids in copies.examples))
    add("pictures without a caption", result.without_caption.count, pictures, result.without_caption.examples)
    add("captions without a picture", result.without_picture.count, captions, result.without_picture.examples)
    add("empty captions", result.empty.count, captions, result.empty.examples)
    repeated = (f"{_short(one.text)} ({one.num_pictures})" for one in result.repeated.examples)
    add("captions of several pictures", result.repeated.count, captions, repeated)
    add(f"captions above {result.context_length} tokens", result.truncated.count, captions, result.truncated.examples)
    stdout.print(table)


def _print_lengths(result: Report) -> None:
    """How many captions there are of each length, as bars."""
    if not result.tokens:
        return
    width = -(-(max(result.tokens) + 1) // _HISTOGRAM_ROWS)
    counts: dict[int, int] = {}
    for length, count in result.tokens.items():
        counts[length // width] = counts.get(length // width, 0) + count
    table = Table(title="Captions by length in tokens", show_header=False, box=None)
    for row in range(min(counts), max(counts) + 1):
        first, last, count = row * width, (row + 1) * width - 1, counts.get(row, 0)
        bar = "█" * -(-count * _HISTOGRAM_WIDTH // max(counts.values()))
        table.add_row(str(first) if first == last else f"{first}-{last}", bar, str(count))
    stdout.print(table)


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 1]}…"
