"""`tuwen data ...`: make and pack image-text data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuwen.cli.console import Data, Out, progress_bar, stdout

data_app = typer.Typer(help="Make and pack image-text data.", no_args_is_help=True)


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
