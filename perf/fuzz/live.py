"""The same inputs through a real server over plain gRPC: every answer an embedding or INVALID_ARGUMENT."""

from __future__ import annotations

import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from perf.fuzz.inputs import FuzzInput, make_input
from perf.fuzz.judgement import BadAnswer, refusal_class
from perf.fuzz.models import OK
from perf.fuzz.pictures import seed_pictures
from perf.fuzz.workers import Findings, rss_mib
from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer

CONCURRENCY = 16
SAMPLE_EVERY = 25
SAMPLE_CHECKPOINT = Path(__file__).parents[2] / "samples" / "emoji_tiny"
SAMPLE_MODEL = "tiny_rn"
TIMEOUT_S = 20.0
_UNIT_TOLERANCE = 1e-4  # float32 rounding of 128 squares, with room
# Where the name of its model instance stands on a model process's command line.
_INSTANCE_ARGUMENT = 8
_REFERENCE_TEXTS = ("一只猫", "戴墨镜的笑脸", "生日蛋糕")


@contextmanager
def sample_server() -> Iterator[EmbeddedServer]:
    """The sample checkpoint, built into a temporary repository and served."""
    with tempfile.TemporaryDirectory(prefix="tuwen-fuzz-") as folder:
        repository = Path(folder)
        command = [sys.executable, "-m", "tuwen.cli", "build", "--checkpoint", str(SAMPLE_CHECKPOINT)]
        subprocess.run([*command, "--repository", folder], check=True, stdout=subprocess.DEVNULL)
        grpc, http, metrics = free_ports(3)
        # Without the cache of answers, which fills on purpose and would hide a leak.
        with EmbeddedServer(
            repository, grpc_port=grpc, http_port=http, metrics_port=metrics, cache_size_bytes=0
        ) as server:
            yield server


def fuzz_sample(seed: int, indices: range, on_progress: Callable[[int], None] = lambda done: None) -> Findings:
    with sample_server() as server:
        return fuzz_own_server(server, seed, indices, on_progress)


def fuzz_own_server(
    server: EmbeddedServer, seed: int, indices: range, on_progress: Callable[[int], None] = lambda done: None
) -> Findings:
    """As `fuzz_server`, and watches the server's processes: none may end, and their memory is sampled."""
    before = _processes(server)

    def sample_memory() -> dict[str, float]:
        return {name: rss_mib(pid) for pid, name in before.items() if Path(f"/proc/{pid}").exists()}

    findings = fuzz_server(server.endpoints.grpc, SAMPLE_MODEL, seed, indices, on_progress, sample_memory)
    after = _processes(server)
    if after != before or not server.is_alive:
        gone = [name for pid, name in before.items() if pid not in after]
        findings.fail(seed, indices.start, f"processes ended meanwhile: {', '.join(gone)}")
    return findings


def fuzz_server(
    url: str,
    model: str,
    seed: int,
    indices: range,
    on_progress: Callable[[int], None] = lambda done: None,
    sample_memory: Callable[[], dict[str, float]] = dict,
) -> Findings:
    """Every input of `indices` to a running server; afterwards it must answer as it did before, to the bit."""
    findings, lock = Findings(), threading.Lock()
    pending: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in indices:
        pending.put(index)

    def note(index: int, outcome: str | BadAnswer, elapsed_s: float) -> None:
        with lock:
            if elapsed_s > findings.slowest_s:
                findings.slowest_s, findings.slowest_index = elapsed_s, index
            if isinstance(outcome, BadAnswer):
                findings.fail(seed, index, str(outcome))
            else:
                findings.outcomes[outcome] += 1
            done = findings.outcomes.total()
            if done % SAMPLE_EVERY == 0:
                for name, rss in sample_memory().items():
                    findings.rss_mib[name].append(rss)
            on_progress(done)

    def call() -> None:
        with triton.InferenceServerClient(url) as client:
            while True:
                try:
                    index = pending.get_nowait()
                except queue.Empty:
                    return
                item = make_input(seed, index)
                started = time.monotonic()
                try:
                    outcome: str | BadAnswer = f"{item.kind}: {_infer(client, model, item)}"
                except BadAnswer as error:
                    outcome = error
                note(index, outcome, time.monotonic() - started)

    expected = _reference(url, model)
    callers = [threading.Thread(target=call, name=f"caller {number}") for number in range(CONCURRENCY)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    if num_missing := len(indices) - findings.outcomes.total():
        findings.fail(seed, indices.start, f"{num_missing} inputs have no verdict: a caller ended early")
    if complaint := _compare(url, model, expected):
        findings.fail(seed, indices.start, complaint)
    return findings


def _infer(client: triton.InferenceServerClient, model: str, item: FuzzInput) -> str:
    try:
        embeds = embed(client, model, item)
    except InferenceServerException as error:
        if error.status() != "StatusCode.INVALID_ARGUMENT":
            raise BadAnswer(f"{item.format} of {len(item.data)} bytes: {error.status()}: {error.message()}") from error
        if item.intact:
            raise BadAnswer(f"a valid {item.format} was refused: {error.message()}") from error
        return refusal_class(error.message())
    if embeds.dtype != np.float32 or abs(float(np.linalg.norm(embeds)) - 1) > _UNIT_TOLERANCE:
        raise BadAnswer(f"{item.format} of {len(item.data)} bytes: no unit-length embedding: {embeds.dtype}")
    return OK


def embed(client: triton.InferenceServerClient, model: str, item: FuzzInput) -> npt.NDArray[np.float32]:
    """(D,) of one input, by the ensemble of its kind."""
    array = item.array()
    tensor = triton.InferInput(item.kind, list(array.shape), "BYTES" if item.kind == "text" else "UINT8")
    tensor.set_data_from_numpy(array)
    result = client.infer(f"{model}_{item.kind}", [tensor], client_timeout=TIMEOUT_S)
    embeds = result.as_numpy(f"{item.kind}_embeds")
    return np.asarray(embeds)[0]


def _reference(url: str, model: str) -> list[npt.NDArray[np.float32]]:
    """Embeddings of some good texts and of every intact picture, one request at a time: no batch, no rounding."""
    texts = [FuzzInput("text", "text", text.encode(), True) for text in _REFERENCE_TEXTS]
    pictures = [FuzzInput("image", format, encoded, True) for format, encoded in seed_pictures()]
    with triton.InferenceServerClient(url) as client:
        return [embed(client, model, item) for item in (*texts, *pictures)]


def _compare(url: str, model: str, expected: list[npt.NDArray[np.float32]]) -> str | None:
    try:
        found = _reference(url, model)
    except InferenceServerException as error:
        return f"a good request afterwards fails: {error.message()}"
    if all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True)):
        return None
    return "the server's embeddings afterwards differ from those before"


def _processes(server: EmbeddedServer) -> dict[int, str]:
    """Process id -> name of the server and of its model processes that live."""
    assert server.pid is not None
    found = {server.pid: "tritonserver"}
    for pid in map(int, Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()):
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if len(arguments) > _INSTANCE_ARGUMENT:  # a dead one has lost them
            found[pid] = arguments[_INSTANCE_ARGUMENT].decode()
    return found
