"""How fast and how large is training, beside Chinese-CLIP's own trainer? And how large with a batch of 4,096?

    make bench-training                     # the tiny architectures on samples/emoji_cn, some minutes

Both train the same architecture from random weights on the same LMDB of pairs, without augmentation, in float32, with
no worker processes, in processes of their own that take turns. Seconds are the wall's, of steps; memory is the most
that a process ever held. Exits 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from perf.processes import PeakRss
from perf.rounds import machine, write_json
from tuwen.data.lmdb import write_lmdb

SAMPLES, SPLIT = Path("samples/emoji_cn"), "valid"
ARCHITECTURES = ("Tiny-RN", "Tiny-ViT")
BATCH, LARGE_BATCH = 128, 4096
MIN_SPEED_RATIO = 1.3
MAX_MEMORY_RATIO = 1.2
_WARM_UP = 2  # steps that are not counted: memory is taken, kernels are chosen
_RECIPE = """
[model]
architecture = "{architecture}"
[data]
path = "{data}"
train_split = "{split}"
unit = "pair"
[optim]
max_steps = {steps}
batch_size = {batch}
chunk_size = {chunk}
[engine]
device = "cpu"
[valid]
split = ""
[run]
out = "{out}"
save_every_epochs = 0
"""


@dataclass(frozen=True)
class Measured:
    """Of one process: the median seconds of its steps, and the most memory it held."""

    step_s: float
    peak_mib: float


def run(command: list[str], log: Path) -> float:
    """The peak memory of a process, MiB.

    Raises:
        RuntimeError: it failed; its last words.
    """
    with open(log, "wb") as out, open(log.with_suffix(".err"), "wb") as err:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=err)
        with PeakRss(process.pid) as peak:
            process.wait()
    if process.returncode:
        raise RuntimeError(log.with_suffix(".err").read_text(errors="replace")[-2000:])
    return peak.bytes / 2**20


def ours(data: Path, architecture: str, batch: int, chunk: int, steps: int, folder: Path) -> Measured:
    """This trainer: `python -m training`."""
    out = Path(tempfile.mkdtemp(dir=folder))
    recipe = out / "recipe.toml"
    recipe.write_text(
        _RECIPE.format(
            architecture=architecture, data=data, split=SPLIT, steps=steps, batch=batch, chunk=chunk, out=out / "run"
        ),
        encoding="utf-8",
    )
    peak = run(["-m", "training", str(recipe)], out / "log")
    lines = (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Measured(_median([json.loads(line)["step_s"] for line in lines]), peak)


def published(data: Path, architecture: str, batch: int, steps: int, folder: Path) -> Measured:
    """Chinese-CLIP's."""
    out = Path(tempfile.mkdtemp(dir=folder))
    arguments = ["--data", str(data / "lmdb" / SPLIT), "--architecture", architecture]
    sizes = ["--batch", str(batch), "--steps", str(steps)]
    peak = run(["-m", "perf.published_trainer", *arguments, *sizes], out / "log")
    return Measured(_median(json.loads((out / "log").read_text().splitlines()[-1])), peak)


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds[_WARM_UP:] or seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--large-steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(".cache/bench/training.json"))
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data"
        write_lmdb(SAMPLES.absolute(), SPLIT, data / "lmdb")
        for architecture in ARCHITECTURES:
            found[architecture] = compare(data, architecture, options.rounds, options.steps, folder)
            found[architecture] |= enlarge(data, architecture, options.large_steps, folder)
    write_json(options.out, {"machine": machine(), **found})
    return 0 if all(_holds(figures) for figures in found.values()) else 1


def compare(data: Path, architecture: str, rounds: int, steps: int, folder: Path) -> dict[str, float]:
    """Both trainers in turn."""
    pairs = [
        (ours(data, architecture, BATCH, 0, steps, folder), published(data, architecture, BATCH, steps, folder))
        for _ in range(rounds)
    ]
    ratio = statistics.median(theirs.step_s / mine.step_s for mine, theirs in pairs)
    rates = [BATCH / statistics.median(one.step_s for one in side) for side in zip(*pairs, strict=True)]
    peaks = [max(one.peak_mib for one in side) for side in zip(*pairs, strict=True)]
    for who, rate, peak in zip(("this trainer", "Chinese-CLIP's"), rates, peaks, strict=True):
        print(f"{architecture}, batch {BATCH}, {who:15s}{rate:7.0f} samples/s{peak:7.0f} MiB", flush=True)
    print(f"{architecture}: {ratio:.2f} times the samples/s (aim {MIN_SPEED_RATIO})", flush=True)
    return {
        "samples_per_s": rates[0], "published_samples_per_s": rates[1], "speed_ratio": ratio,
        "peak_mib": peaks[0], "published_peak_mib": peaks[1],
    }  # fmt: skip


def enlarge(data: Path, architecture: str, steps: int, folder: Path) -> dict[str, float]:
    """This trainer with the large batch in chunks, beside the small one whole, of as many samples: memory grows."""
    small = ours(data, architecture, BATCH, 0, steps * LARGE_BATCH // BATCH, folder)
    large = ours(data, architecture, LARGE_BATCH, BATCH, steps, folder)
    ratio = large.peak_mib / small.peak_mib
    for batch, chunk, one in ((BATCH, BATCH, small), (LARGE_BATCH, BATCH, large)):
        rate = batch / one.step_s
        print(
            f"{architecture}, batch {batch}, chunks of {chunk}: {rate:.0f} samples/s, {one.peak_mib:.0f} MiB",
            flush=True,
        )
    print(f"{architecture}: {ratio:.2f} times the memory (at most {MAX_MEMORY_RATIO})", flush=True)
    return {"large_samples_per_s": LARGE_BATCH / large.step_s, "large_peak_mib": large.peak_mib, "memory_ratio": ratio}


def _holds(figures: dict[str, float]) -> bool:
    return figures["speed_ratio"] >= MIN_SPEED_RATIO and figures["memory_ratio"] <= MAX_MEMORY_RATIO


if __name__ == "__main__":
    sys.exit(main())
