"""How many instances of a tower, threads and batches at once, and how many decoders suit this machine? Measured.

tuwen build --checkpoint samples/emoji_tiny --tune

Each way is served by the embedded server and asked by 16 callers at a time, then by one alone. The best is written to
`configs/tuned.pbtxt` beside a model's config.pbtxt: what `tuwen serve` loads where there is one, and a person can read
and change. Its header has the measurements.
"""

from __future__ import annotations

import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2 as pb

from builders.configs import BATCHES_AT_ONCE
from builders.towers import SAMPLES_DIR, TOWERS, TowerKind
from tuwen.data.pairs import open_pairs
from tuwen.files import write_text
from tuwen.image_transform import preprocess_image
from tuwen.serving.model_repository import TUNED_CONFIG
from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer

# More instances than this hold the weights as many times, and gained nothing where it was measured.
MAX_INSTANCES = 4
# What a lone request may lose, as a factor, for the sake of throughput.
MAX_SLOWER_ALONE = 1.25
# A way that is better by less than this is not: the one with fewer instances, and less memory, stays.
MIN_GAIN = 1.03
PASSES = 3
_CALLERS = 16
_ALONE = 5
_ROUND_S = 4.0
_PHOTOGRAPH = (640, 480)
_CHANGED = "instance_group, intra_op_thread_count, batches_at_once"


@dataclass(frozen=True)
class Candidate:
    """Instances of a tower, and of each intra_op_thread_count and batches_at_once."""

    instances: int
    threads: int
    at_once: int = 1

    @property
    def copies(self) -> int:
        """Of the weights in memory."""
        return self.instances * min(self.at_once, 2)

    def describe(self) -> str:
        at_once = f", {self.at_once} batches at once" if self.at_once > 1 else ""
        return f"{self.instances} x {self.threads} threads{at_once}"


@dataclass(frozen=True)
class Measured:
    """Median items per second with 16 under way, and milliseconds of one alone."""

    candidate: Candidate
    items_per_s: float
    alone_ms: float

    def describe(self) -> str:
        return f"{self.candidate.describe()}: {self.items_per_s:.1f}/s, alone {self.alone_ms:.1f} ms"


def candidates(num_cores: int) -> list[Candidate]:
    """Ways to share the cores among batches, and among instances; and two instances that both use them all.

    Of the latter one computes while the other takes its next batch, or waits for a core that something else has.
    """
    shared = [Candidate(n, num_cores // n) for n in range(1, min(num_cores, MAX_INSTANCES) + 1) if num_cores % n == 0]
    beside = [Candidate(1, num_cores, n) for n in (2, 4) if n <= num_cores]
    return list(dict.fromkeys([shared[0], *beside, Candidate(2, num_cores), *shared[1:]]))


def choose(measured: Sequence[Measured]) -> Measured:
    """The highest throughput of those that answer a lone request in nearly the best time; of equals the smallest."""
    fastest_alone = min(each.alone_ms for each in measured)
    eligible = [each for each in measured if each.alone_ms <= MAX_SLOWER_ALONE * fastest_alone]
    best = max(each.items_per_s for each in eligible)
    good = [each for each in eligible if MIN_GAIN * each.items_per_s >= best]
    return min(good, key=lambda each: (each.candidate.copies, -each.items_per_s))


def tune(
    repository: Path,
    name: str,
    resolution: int,
    on_stage: Callable[[str], None] = lambda stage: None,
    num_cores: int | None = None,
) -> list[Path]:
    """Measure the placed towers of a model and the decoding of its pictures; returns the files written.

    Args:
        resolution: of pixel_values.
        num_cores: by default those that this process may use.
    Raises:
        ServerError, MissingDependency: the embedded server does not run here.
    """
    cores = num_cores or len(os.sched_getaffinity(0))
    photograph = _photograph()
    written, rates = [], {}
    for kind in TOWERS:
        ways = candidates(cores)
        rounds: dict[Candidate, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(PASSES):
            for way in ways:
                on_stage(f"tuning the {kind} tower: {way.describe()}, {number + 1} of {PASSES}")
                rounds[way].append(_measure(repository, name, kind, resolution, way, photograph))
        measured = [Measured(way, *map(statistics.median, zip(*found, strict=True))) for way, found in rounds.items()]
        chosen = choose(measured)
        rates[kind] = chosen.items_per_s
        notes = [each.describe() for each in measured]
        model_dir = repository / f"{name}_{kind}_tower"
        config = _configured(model_dir / "config.pbtxt", chosen.candidate)
        written.append(_write(model_dir, config, _CHANGED, notes))
    on_stage("tuning the decoders")
    decode_ms = _decode_ms(photograph, resolution)
    # As many as keep the tower busy, and one more, so that decoding is never what is waited for.
    decoders = min(max(cores, 2), 1 + -(-int(rates["image"] * decode_ms) // 1000))
    width, height = _PHOTOGRAPH
    note = f"{decode_ms:.1f} ms a picture of {width} x {height}; the tower takes {rates['image']:.1f}/s"
    model_dir = repository / f"preprocess_image_{resolution}"
    config = _read(model_dir / "config.pbtxt")
    config.parameters["decoders"].string_value = str(decoders)
    written.append(_write(model_dir, config, "decoders", [note]))
    return written


def _measure(
    repository: Path, name: str, kind: TowerKind, resolution: int, way: Candidate, photograph: bytes
) -> tuple[float, float]:
    """Items per second of 16 callers, and milliseconds of one alone, through a server of its own."""
    steps = ["tokenize_text", f"{name}_text_cached"] if kind == "text" else [f"preprocess_image_{resolution}"]
    ensemble, tower = f"{name}_{kind}", f"{name}_{kind}_tower"
    with _copied(repository, [ensemble, tower, *steps]) as copy:
        config = copy / tower / "config.pbtxt"
        tuned = _configured(config, way)
        config.unlink()  # it may be a link to the original
        config.write_text(_text(tuned), encoding="utf-8")
        grpc_port, http_port, metrics_port = free_ports(3)
        server = EmbeddedServer(
            copy, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, cache_size_bytes=0
        )
        try:
            url = server.start().grpc
            with triton.InferenceServerClient(url) as client:
                return _ask(client, ensemble, _inputs(kind, photograph))
        finally:
            server.stop(timeout_s=0)


def _ask(client: triton.InferenceServerClient, ensemble: str, inputs: list[triton.InferInput]) -> tuple[float, float]:
    turns = iter(range(10**9))

    def ask_one() -> None:
        client.infer(ensemble, [inputs[next(turns) % len(inputs)]])

    ask_one()
    alone_ms = statistics.median(_seconds(ask_one) for _ in range(_ALONE)) * 1000
    ends_at = time.perf_counter() + _ROUND_S

    def ask_until_the_end() -> int:
        asked = 0
        while time.perf_counter() < ends_at:
            ask_one()
            asked += 1
        return asked

    started = time.perf_counter()
    with ThreadPoolExecutor(_CALLERS) as pool:
        answered = sum(each.result() for each in [pool.submit(ask_until_the_end) for _ in range(_CALLERS)])
    return answered / (time.perf_counter() - started), alone_ms


def _inputs(kind: TowerKind, photograph: bytes) -> list[triton.InferInput]:
    if kind == "image":
        data = np.frombuffer(photograph, np.uint8)[None]
        return [triton.InferInput("image", list(data.shape), "UINT8").set_data_from_numpy(data)]
    captions = [record.text.encode() for record in open_pairs(SAMPLES_DIR, "valid").texts[::97]]
    return [
        triton.InferInput("text", [1, 1], "BYTES").set_data_from_numpy(np.array([[caption]], np.object_))
        for caption in captions
    ]


@contextmanager
def _copied(repository: Path, models: Sequence[str]) -> Iterator[Path]:
    """A repository of these models alone, whose files are links where the file system has them."""
    with tempfile.TemporaryDirectory(prefix=".tune-", dir=repository) as folder:
        for model in models:
            shutil.copytree(repository / model, Path(folder, model), copy_function=_link)
        yield Path(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _photograph() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(_PHOTOGRAPH, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _decode_ms(photograph: bytes, resolution: int) -> float:
    times = [_seconds(partial(preprocess_image, photograph, resolution, draft=True)) for _ in range(15)]
    return statistics.median(times) * 1000


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _read(path: Path) -> pb.ModelConfig:
    return text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())


def _configured(path: Path, way: Candidate) -> pb.ModelConfig:
    """The config with a candidate's instances, threads and batches at once."""
    config = _read(path)
    config.instance_group[0].count = way.instances
    config.parameters["intra_op_thread_count"].string_value = str(way.threads)
    config.parameters[BATCHES_AT_ONCE].string_value = str(way.at_once)
    return config


def _text(config: pb.ModelConfig) -> str:
    return str(text_format.MessageToString(config, use_short_repeated_primitives=True, as_utf8=True))


def _write(model_dir: Path, config: pb.ModelConfig, changed: str, measured: Sequence[str]) -> Path:
    header = [
        "Written by `tuwen build --tune` on this machine; `tuwen serve` loads it instead of ../config.pbtxt.",
        *measured,
        f"Change here: {changed}; or remove the file.",
    ]
    path = model_dir / "configs" / f"{TUNED_CONFIG}.pbtxt"
    write_text(path, "".join(f"# {line}\n" for line in header) + _text(config))
    return path
