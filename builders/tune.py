"""How many instances of a tower, of how many threads each, and how many decoders suit this machine? Measured.

tuwen build --checkpoint samples/emoji_tiny --tune

Writes `configs/tuned.pbtxt` beside a model's config.pbtxt: what `tuwen serve` loads where there is one, and a person
can read and change. Its header has the measurements.
"""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2 as pb

from builders.onnx_export import TOWERS, TowerKind
from builders.parity import SAMPLES_DIR
from tuwen.data.pairs import open_pairs
from tuwen.files import write_text
from tuwen.image_transform import preprocess_image
from tuwen.tokenizer import default_tokenizer, normalize_text, pack_rows

TUNED = "tuned"
# More instances than this hold the weights as many times, and gained nothing where it was measured.
MAX_INSTANCES = 4
# What a lone request may lose, as a factor, for the sake of throughput.
MAX_SLOWER_ALONE = 1.25
ROUNDS = 5
_IN_FLIGHT = 16  # items that the instances of one candidate share in a round
_PHOTOGRAPH = (640, 480)

Feed = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Candidate:
    """Instances of a tower, and intra_op_thread_count of each."""

    instances: int
    threads: int


@dataclass(frozen=True)
class Measured:
    """Median items per second with 16 under way, and milliseconds of one alone."""

    candidate: Candidate
    items_per_s: float
    alone_ms: float

    def describe(self) -> str:
        instances, threads = self.candidate.instances, self.candidate.threads
        return f"{instances} x {threads} threads: {self.items_per_s:.1f}/s, alone {self.alone_ms:.1f} ms"


def candidates(num_cores: int) -> list[Candidate]:
    """Ways to share the cores among instances; every one uses them all."""
    return [Candidate(n, num_cores // n) for n in range(1, min(num_cores, MAX_INSTANCES) + 1) if num_cores % n == 0]


def choose(measured: Sequence[Measured]) -> Measured:
    """The highest throughput among those that answer a lone request in nearly the best time."""
    fastest_alone = min(each.alone_ms for each in measured)
    eligible = [each for each in measured if each.alone_ms <= MAX_SLOWER_ALONE * fastest_alone]
    return max(eligible, key=lambda each: each.items_per_s)


def tune(
    repository: Path,
    name: str,
    version: int,
    resolution: int,
    on_stage: Callable[[str], None] = lambda stage: None,
    num_cores: int | None = None,
) -> list[Path]:
    """Measure the placed towers of a model and the decoding of its pictures; returns the files written.

    Args:
        resolution: of pixel_values.
        num_cores: by default those that this process may use.
    """
    cores = num_cores or len(os.sched_getaffinity(0))
    written, rates = [], {}
    for kind in TOWERS:
        on_stage(f"tuning the {kind} tower")
        tower_dir = repository / f"{name}_{kind}_tower"
        measured = _measure_tower(tower_dir / str(version) / "model.onnx", _feed(kind, resolution), candidates(cores))
        chosen = choose(measured)
        rates[kind] = chosen.items_per_s
        written.append(_write(tower_dir, chosen.candidate, [each.describe() for each in measured]))
    on_stage("tuning the decoders")
    decode_ms = _decode_ms(resolution)
    # As many as keep the tower busy, and one more, so that decoding is never what is waited for.
    decoders = min(cores, 1 + -(-int(rates["image"] * decode_ms) // 1000))
    note = (
        f"{decode_ms:.1f} ms a picture of {_PHOTOGRAPH[0]} x {_PHOTOGRAPH[1]}; the tower takes {rates['image']:.1f}/s"
    )
    written.append(_write(repository / f"preprocess_image_{resolution}", Candidate(max(decoders, 1), 0), [note]))
    return written


def _feed(kind: TowerKind, resolution: int) -> Callable[[int], Feed]:
    """A batch of so many captions, or pictures."""
    captions = [record.text for record in open_pairs(SAMPLES_DIR, "valid").texts[::97]]
    rows = [default_tokenizer().encode_ids(normalize_text(caption)) for caption in captions]
    if kind == "text":
        return lambda size: dict(pack_rows([rows[index % len(rows)] for index in range(size)]))
    return lambda size: {"pixel_values": np.zeros((size, 3, resolution, resolution), np.float32)}


def _measure_tower(onnx_path: Path, feed: Callable[[int], Feed], ways: Sequence[Candidate]) -> list[Measured]:
    """All candidates in turn, several rounds over; one session an instance, as in the server."""
    rates: dict[Candidate, list[float]] = {way: [] for way in ways}
    alone: dict[Candidate, list[float]] = {way: [] for way in ways}
    sessions = {way: [_open(onnx_path, way.threads) for _ in range(way.instances)] for way in ways}
    for round_index in range(ROUNDS + 1):
        for way in ways:
            together = _seconds(partial(_run_all, sessions[way], feed(_IN_FLIGHT // way.instances)))
            single = _seconds(partial(sessions[way][0].run, None, feed(1)))
            if round_index:  # the first one warms up
                rates[way].append(_IN_FLIGHT / together)
                alone[way].append(single * 1000)
    return [Measured(way, statistics.median(rates[way]), statistics.median(alone[way])) for way in ways]


def _open(onnx_path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(onnx_path, options, providers=["CPUExecutionProvider"])


def _run_all(sessions: Sequence[ort.InferenceSession], feed: Feed) -> None:
    with ThreadPoolExecutor(len(sessions)) as pool:
        for each in [pool.submit(session.run, None, feed) for session in sessions]:
            each.result()


def _decode_ms(resolution: int) -> float:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(_PHOTOGRAPH, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    times = [_seconds(partial(preprocess_image, file.getvalue(), resolution, draft=True)) for _ in range(3 * ROUNDS)]
    return statistics.median(times) * 1000


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _write(model_dir: Path, chosen: Candidate, measured: Sequence[str]) -> Path:
    """The model's config.pbtxt with the instances, and threads where they count, of the candidate."""
    config = text_format.Parse((model_dir / "config.pbtxt").read_text(encoding="utf-8"), pb.ModelConfig())
    config.instance_group[0].count = chosen.instances
    if chosen.threads:
        config.parameters["intra_op_thread_count"].string_value = str(chosen.threads)
    header = [
        "Written by `tuwen build --tune` on this machine; `tuwen serve` loads it instead of ../config.pbtxt.",
        *measured,
        "Change here: instance_group, intra_op_thread_count; or remove the file.",
    ]
    body = text_format.MessageToString(config, use_short_repeated_primitives=True, as_utf8=True)
    path = model_dir / "configs" / f"{TUNED}.pbtxt"
    write_text(path, "".join(f"# {line}\n" for line in header) + body)
    return path
