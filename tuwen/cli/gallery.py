"""`tuwen export gallery`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuwen.cli.console import Checkpoint, Out, progress_bar, stdout


def export_gallery(
    checkpoint: Checkpoint,
    images: Annotated[Path, typer.Option("--images", help="Folder of pictures, or an *_imgs.tsv.")],
    out: Out = Path("dist/gallery"),
) -> None:
    """Embed pictures for an app: their names and vectors in one file, gallery.safetensors."""
    from tuwen_client.images import encode_image_file

    from builders.ios_gallery import write_gallery
    from tuwen.checkpoint import load_checkpoint
    from tuwen.cli.search import gallery

    pictures = gallery(images)
    model = load_checkpoint(checkpoint)
    with progress_bar("embedding pictures") as report:
        path = write_gallery(
            model,
            [picture.name for picture in pictures],
            (encode_image_file(picture.source) for picture in pictures),
            out,
            lambda done: report(done, len(pictures)),
        )
    stdout.print(f"{path}: {len(pictures)} pictures, {path.stat().st_size / 1e6:.1f} MB", soft_wrap=True)
