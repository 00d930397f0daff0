"""`tuwen train` and what belongs to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuwen.cli.console import Checkpoint, Out, progress_bar, stderr, stdout
from tuwen.errors import InvalidInput

if TYPE_CHECKING:
    from training.train import Resume, Run
    from training.watchers import Watcher

_RESUME_HELP = "auto: go on from the newest state in run.out, if there is one; never: begin anew; or a state's folder."


def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, instead of the recipe's; several times.")
    ] = None,
    resume: Annotated[str, typer.Option("--resume", help=_RESUME_HELP)] = "auto",
    processes: Annotated[int, typer.Option("--processes", min=1, help="On this machine, as torchrun has them.")] = 1,
) -> None:
    """Train from a recipe, or go on with it; prints the checkpoint folder."""
    from training.recipe import load_recipe
    from training.train import Stopped
    from training.train import train as run_training

    loaded = load_recipe(recipe, overrides or ())
    if processes > 1:
        raise typer.Exit(_run_processes(processes, recipe, overrides or [], resume))
    is_first = int(os.environ.get("RANK", "0")) == 0
    try:
        out = run_training(loaded, _resume(resume), _watch)
    except Stopped as stopped:  # as asked: no failure
        if is_first:
            stderr.print(str(stopped), soft_wrap=True)
        return
    if is_first:
        stdout.print(out)


def _resume(value: str) -> Resume:
    if value == "auto":
        return "auto"
    if value == "never":
        return "never"
    if not Path(value).is_dir():
        raise InvalidInput(f"--resume {value}: no such folder; expected auto, never or the folder of a state")
    return Path(value)


def _watch(run: Run) -> Watcher:
    from training.metrics import METRICS_FILE, best_validation
    from training.terminal import RunPlan, terminal_view
    from training.watchers import Watchers, saved_views

    recipe = run.recipe.run
    best = best_validation(recipe.out / METRICS_FILE, run.step)
    plan = RunPlan(recipe.out, run.num_steps, run.num_epochs, recipe.log_every_steps, run.step, best)
    return Watchers([*saved_views(run.recipe, run.step), terminal_view(stderr, plan)])


def _run_processes(count: int, recipe: Path, overrides: list[str], resume: str) -> int:
    """torchrun's exit code."""
    # torchrun itself meets its processes through libuv, which torch for Windows is built without.
    environment = os.environ | ({"USE_LIBUV": "0"} if sys.platform == "win32" else {})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    settings = [part for override in overrides for part in ("--set", override)]
    command = [*launcher, "-m", "training", str(recipe), *settings, "--resume", resume]
    with subprocess.Popen(command, env=environment) as torchrun:
        # Ctrl-C reaches torchrun from the terminal, SIGTERM through here; either way it is waited for while it saves.
        signal.signal(signal.SIGINT, lambda number, frame: None)
        signal.signal(signal.SIGTERM, lambda number, frame: _stop_processes(torchrun))
        return torchrun.wait()


def _stop_processes(torchrun: subprocess.Popen[bytes]) -> None:
    """Ask what torchrun started to stop: it ends well when all of that does, and calls a stop of its own a failure."""
    try:
        workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text(encoding="ascii").split()
    except OSError:  # no such file on this system
        workers = []
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(int(worker), signal.SIGTERM)
    if not workers:
        torchrun.terminate()


def teacher_features(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe, for its data.")],
    checkpoint: Checkpoint,
    out: Out,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="As of `tuwen train`.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda.")] = None,
) -> None:
    """Compute a teacher's embeddings of a recipe's data once, for its distill.features; prints the folder."""
    from training.recipe import load_recipe
    from training.teacher_features import write_teacher_features

    loaded = load_recipe(recipe, overrides or ())
    with progress_bar("teaching") as report:
        stdout.print(write_teacher_features(checkpoint, loaded.data, out, device, on_progress=report))
