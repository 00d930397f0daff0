"""A run that is killed at random moments ends with the very weights of one that was not: by one process and by two."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.shapes import shape_pairs, write_pairs
from training.metrics import StepRecord, read_metrics
from training.state import newest_state
from tuwen.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
NUM_STEPS = 48
RECIPE = """
[model]
architecture = "Tiny-ViT"
mask_ratio = 0.5

[data]
path = "{data}"
captions_per_image = 2
join_captions = 0.5
num_workers = {workers}

[optim]
max_steps = 48
batch_size = 8
chunk_size = {chunk}
lr = 1e-3
warmup_steps = 2
ema_decay = 0.99

[augment]
rotate_degrees = 5
rand_augment_changes = 1

[engine]
device = "cpu"

[valid]
every_epochs = 9

[run]
out = "{out}"
save_every_epochs = 0
save_every_steps = 3
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for split in ("train", "valid"):
        write_pairs(folder, split, shape_pairs())
    return folder


def recipe_in(folder: Path, shapes: Path, processes: int) -> Path:
    path = folder.with_suffix(".toml")
    workers, chunk = (1, 0) if processes == 1 else (0, 2)
    path.write_text(RECIPE.format(data=shapes, out=folder, workers=workers, chunk=chunk), encoding="utf-8")
    return path


def start(recipe: Path, processes: int, *settings: str) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "training", str(recipe), *settings],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_done(out: Path) -> int:
    return max((one.step for one in read_metrics(out / "metrics.jsonl") if isinstance(one, StepRecord)), default=0)


def kill(run: subprocess.Popen[str]) -> None:
    """All of its processes, at once."""
    everyone = [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]
    for process in everyone:
        process.send_signal(signal.SIGKILL)
    run.communicate()


@pytest.mark.parametrize("processes", [1, 2])
def test_five_kills_change_no_bit(processes: int, shapes: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(recipe_in(whole, shapes, processes), processes)
    _, err = reference.communicate(timeout=240)
    assert reference.returncode == 0, err[-3000:]
    dice = random.Random(time.time_ns())
    targets = sorted(dice.sample(range(2, NUM_STEPS - 1), 5))
    recipe = recipe_in(killed, shapes, processes)
    for target in targets:
        run = start(recipe, processes)
        while steps_done(killed) < target and run.poll() is None:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.05))  # in the middle of a step, or of saving
        assert run.poll() is None, f"ended before it was killed at {targets}: {run.communicate()[1][-3000:]}"
        kill(run)
        newest = newest_state(killed)
        assert newest is None or load_checkpoint(newest)  # whatever is there is whole
    last = start(recipe, processes)
    out, err = last.communicate(timeout=240)
    assert last.returncode == 0, err[-3000:]
    assert out.strip().replace("\n", "") == str(killed)
    expected = load_checkpoint(whole / "checkpoints" / f"step_{NUM_STEPS:08d}").state_dict()
    for key, value in load_checkpoint(killed / "checkpoints" / f"step_{NUM_STEPS:08d}").state_dict().items():
        assert torch.equal(value, expected[key]), f"{key}, killed at {targets}"
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    steps = [one.step for one in read_metrics(killed / "metrics.jsonl") if isinstance(one, StepRecord)]
    assert steps == list(range(1, NUM_STEPS + 1))  # none twice, none left out
    losses = [[one.loss for one in read_metrics(folder / "metrics.jsonl") if isinstance(one, StepRecord)]
              for folder in (whole, killed)]  # fmt: skip
    assert losses[0] == losses[1]


def test_sigterm_saves_and_ends_well(shapes: Path, tmp_path: Path) -> None:
    """By two processes with a share of the weights each; gone on with, they end where others end at once."""
    sharded = ("--set", "engine.strategy=fsdp", "--set", "optim.max_steps=12")
    whole, out = tmp_path / "whole", tmp_path / "out"
    reference = start(recipe_in(whole, shapes, processes=2), 2, *sharded)
    _, err = reference.communicate(timeout=240)
    assert reference.returncode == 0, err[-3000:]
    recipe = recipe_in(out, shapes, processes=2)
    run = start(recipe, 2, *sharded)
    while steps_done(out) < 4 and run.poll() is None:
        time.sleep(0.01)
    for worker in psutil.Process(run.pid).children():
        worker.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 0, err[-3000:]
    assert f"stopped after step {steps_done(out)} of 12" in err.replace("\n", " ")
    newest = newest_state(out)
    assert newest is not None
    assert newest.name == f"step_{steps_done(out):08d}"
    last = start(recipe, 2, *sharded)
    _, err = last.communicate(timeout=240)
    assert last.returncode == 0, err[-3000:]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_what_ends_one_process_ends_the_others_with_its_sentence(shapes: Path, tmp_path: Path) -> None:
    """A picture that only one of them reads, and cannot; the other would wait for it for ever."""
    pairs = shape_pairs()
    broken = max(pairs.images)
    write_pairs(tmp_path, "train", type(pairs)({**pairs.images, broken: b"no picture"}, pairs.texts))
    write_pairs(tmp_path, "valid", pairs)
    run = start(recipe_in(tmp_path / "out", tmp_path, processes=2), 2)
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    text = " ".join(err.split())
    assert f"error: picture {broken} cannot be read" in text
    assert "[rank" not in err  # torch's traceback of a process of ours
