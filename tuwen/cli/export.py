"""From a checkpoint to other runtimes: `tuwen export coreml`."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.table import Table

from tuwen.cli.console import Checkpoint, Json, Out, stderr, stdout

if TYPE_CHECKING:
    from builders.coreml_towers import Precision

export_app = typer.Typer(help="Export a checkpoint to another runtime.", no_args_is_help=True)


class CoreMLPrecision(StrEnum):
    """Of the packages' weights; all but fp32 compute in half precision."""

    fp32 = "fp32"
    fp16 = "fp16"
    palette8 = "palette8"
    palette6 = "palette6"
    int8 = "int8"


@export_app.command()
def coreml(
    checkpoint: Checkpoint,
    out: Out,
    precision: Annotated[
        list[CoreMLPrecision], typer.Option("--precision", help="May be given several times: a folder for each.")
    ] = [CoreMLPrecision.fp16],  # noqa: B006  # typer reads it, nobody changes it
    target: Annotated[int, typer.Option("--target", help="The oldest iOS that loads the packages: 16, 17 or 18.")] = 16,
    name: Annotated[str | None, typer.Option("--name", help="Of the packages; default: the architecture's.")] = None,
    model_version: Annotated[int, typer.Option("--version", help="As Xcode shows it.")] = 1,
    author: Annotated[str, typer.Option("--author", help="As Xcode shows it.")] = "Tuwen",
    licence: Annotated[
        str | None, typer.Option("--licence", help="As Xcode shows it; default: that of the checkpoint.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write Core ML packages of both towers, the vocabulary and a card for the app; each is run and compared first."""
    from builders.coreml_export import Request, export_coreml

    precisions = cast("tuple[Precision, ...]", tuple(dict.fromkeys(one.value for one in precision)))
    request = Request(precisions, target, name, model_version, author, licence)
    with stderr.status("exporting") as status:
        result = export_coreml(checkpoint, out, request, status.update)
    if as_json:
        towers = {one: {kind: asdict(tower) for kind, tower in both.items()} for one, both in result.towers.items()}
        answer = {"name": result.name, "fingerprint": result.fingerprint, "out": str(out), "towers": towers}
        print(json.dumps(answer, default=str, ensure_ascii=False))
        return
    table = Table("package", "MB", "cosine with PyTorch", "largest difference")
    for both in result.towers.values():
        for tower in both.values():
            parity = tower.parity
            cells = (f"{tower.size_bytes / 1e6:.1f}", f"{parity.min_cosine:.6f}", f"{parity.max_abs_diff:.1e}")
            table.add_row(str(out / tower.path), *cells)
    stdout.print(table)
    stdout.print(f"fingerprint {result.fingerprint}; drag the folder into Xcode, packages, vocab.txt and model.json")
