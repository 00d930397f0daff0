"""From a checkpoint to a served model: `tuwen build`, `tuwen render`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuwen.cli.console import DEFAULT_REPOSITORY, Checkpoint, Json, Repository, stderr, stdout

if TYPE_CHECKING:
    from builders.build import BuildResult
    from builders.build import Precision as CpuPrecision


class Profile(StrEnum):
    """Of the machine that serves: which artifacts are made."""

    cpu = "cpu"
    gpu = "gpu"


class Precision(StrEnum):
    """Of the served towers."""

    fp32 = "fp32"
    int8 = "int8"
    fp16 = "fp16"
    bf16 = "bf16"
    fp8 = "fp8"


_PRECISION_HELP = "cpu: fp32 (default) or int8. gpu: fp16 (default), bf16, fp32, int8, fp8. All are checked."


def build(
    checkpoint: Checkpoint,
    name: Annotated[
        str | None, typer.Option("--name", help="Name to serve under; default: the architecture's.")
    ] = None,
    model_version: Annotated[int, typer.Option("--version", help="Version folder; new weights go beside the old.")] = 1,
    profile: Annotated[Profile, typer.Option("--profile", help="gpu: TensorRT plans for the GPU here as well.")] = (
        Profile.cpu
    ),
    precision: Annotated[Precision | None, typer.Option("--precision", help=_PRECISION_HELP)] = None,
    if_changed: Annotated[bool, typer.Option("--if-changed", help="Make nothing that is there already.")] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="gpu: plans that later TensorRT runs too; slower.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="gpu: one plan for every GPU from Ampere on; slower.")
    ] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Measure what suits this machine.")] = False,
    repository: Repository = DEFAULT_REPOSITORY,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to ONNX, check it against PyTorch, and place it in the model repository."""
    from builders.repository import lone_build
    from tuwen.cli.gpu_model import build_for_gpu

    with lone_build(repository, on_wait=_tell_waiting):
        if profile is Profile.gpu:
            _check_not_tuned(tune)
            compatible = (version_compatible, hardware_compatible)
            build_for_gpu(checkpoint, name, repository, model_version, precision, compatible, if_changed, as_json)
        else:
            wanted = _cpu_precision(precision, profile_options=version_compatible or hardware_compatible)
            _build_for_cpu(checkpoint, name, repository, model_version, wanted, tune, if_changed, as_json)


def _tell_waiting() -> None:
    stderr.print("waiting for another build of this repository to end")


def _check_not_tuned(tune: bool) -> None:
    from tuwen.errors import InvalidInput

    if tune:
        raise InvalidInput("--tune measures the CPU model: leave it out, or take --profile cpu")


def _cpu_precision(precision: Precision | None, profile_options: bool) -> CpuPrecision:
    from tuwen.errors import InvalidInput

    if profile_options:
        raise InvalidInput("--version-compatible and --hardware-compatible are of TensorRT plans: give --profile gpu")
    if precision is None or precision is Precision.fp32:
        return "fp32"
    if precision is Precision.int8:
        return "int8"
    raise InvalidInput(f"--precision {precision.value}: a CPU model is fp32 or int8; for others give --profile gpu")


def _build_for_cpu(
    checkpoint: Path,
    name: str | None,
    repository: Path,
    model_version: int,
    precision: CpuPrecision,
    tune: bool,
    if_changed: bool,
    as_json: bool,
) -> None:
    from builders.build import build as run_build
    from builders.tune import tune as run_tune

    with stderr.status("building") as status:
        result = run_build(checkpoint, name, repository, model_version, status.update, precision, if_changed)
        tuned = run_tune(repository, result.name, result.resolution, status.update) if tune else []
    if as_json:
        _print_json(result, tuned)
        return
    _print_result(result)
    for path in tuned:
        stdout.print(f"{path}: what suits this machine, and what was measured", soft_wrap=True)
    if not result.is_current:
        stdout.print(f"fingerprint {result.fingerprint}; now run: tuwen serve")


def _print_json(result: BuildResult, tuned: list[Path]) -> None:
    parity = {kind: vars(measured) for kind, measured in result.parity.items()}
    print(
        json.dumps(
            {"name": result.name, "fingerprint": result.fingerprint, "parity_with_pytorch": parity}
            | ({"int8_against_fp32": vars(result.int8_cost)} if result.int8_cost else {})
            | ({"tuned": [str(path) for path in tuned]} if tuned else {})
            | ({"is_current": True} if result.is_current else {})
        )
    )


def _print_result(result: BuildResult) -> None:
    if result.is_current:
        stdout.print(
            f"{result.repository}/{result.name}, version {result.version}: current, nothing was made", soft_wrap=True
        )
        return
    for kind, parity in result.parity.items():
        stdout.print(
            f"{result.repository}/{result.name}_{kind}_tower/{result.version}: equals PyTorch to cosine "
            f"{parity.min_cosine:.6f}, largest difference {parity.max_abs_diff:.1e}",
            soft_wrap=True,
        )
    if cost := result.int8_cost:
        stdout.print(
            f"int8: cosine with float32 at least {min(cost.min_cosine.values()):.5f}; recall@10 on Emoji-CN "
            f"{cost.recall_at_10:.1%}, float32 {cost.recall_at_10_fp32:.1%}",
            soft_wrap=True,
        )


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
