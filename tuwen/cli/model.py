"""From a checkpoint to a served model: `tuwen build`, `tuwen render`."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from tuwen.cli.console import DEFAULT_REPOSITORY, Checkpoint, Json, Repository, stderr, stdout


class Precision(StrEnum):
    """Of the served towers' weights."""

    fp32 = "fp32"
    int8 = "int8"


def build(
    checkpoint: Checkpoint,
    name: Annotated[
        str | None, typer.Option("--name", help="Name to serve under; default: the architecture's.")
    ] = None,
    model_version: Annotated[int, typer.Option("--version", help="Version folder; new weights go beside the old.")] = 1,
    precision: Annotated[Precision, typer.Option("--precision", help="int8 is faster, and checked.")] = Precision.fp32,
    tune: Annotated[bool, typer.Option("--tune", help="Measure what suits this machine.")] = False,
    repository: Repository = DEFAULT_REPOSITORY,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to ONNX, check it against PyTorch, and place it in the model repository."""
    from builders.build import build as run_build
    from builders.tune import tune as run_tune

    with stderr.status("building") as status:
        result = run_build(checkpoint, name, repository, model_version, status.update, precision.value)
        tuned = run_tune(repository, result.name, result.resolution, status.update) if tune else []
    if as_json:
        parity = {kind: vars(measured) for kind, measured in result.parity.items()}
        print(
            json.dumps(
                {"name": result.name, "fingerprint": result.fingerprint, "parity_with_pytorch": parity}
                | ({"int8_against_fp32": vars(result.int8_cost)} if result.int8_cost else {})
                | ({"tuned": [str(path) for path in tuned]} if tuned else {})
            )
        )
        return
    for kind, parity_of_tower in result.parity.items():
        stdout.print(
            f"{result.repository}/{result.name}_{kind}_tower/{result.version}: equals PyTorch to cosine "
            f"{parity_of_tower.min_cosine:.6f}, largest difference {parity_of_tower.max_abs_diff:.1e}",
            soft_wrap=True,
        )
    if cost := result.int8_cost:
        stdout.print(
            f"int8: cosine with float32 at least {min(cost.min_cosine.values()):.5f}; recall@10 on Emoji-CN "
            f"{cost.recall_at_10:.1%}, float32 {cost.recall_at_10_fp32:.1%}",
            soft_wrap=True,
        )
    for path in tuned:
        stdout.print(f"{path}: what suits this machine, and what was measured", soft_wrap=True)
    stdout.print(f"fingerprint {result.fingerprint}; now run: tuwen serve")


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
