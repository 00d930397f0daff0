"""NVIDIA's perf_analyzer: find it, run one load with it, read what it measured.

load + input data -> a CSV as perf_analyzer writes it, and a Measurement. `make perf-analyzer` fetches the binary.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuwen.errors import InvalidInput, MissingDependency

BINARY, ORIGIN = "perf_analyzer", "origin.json"
ANALYZER_DIR = Path(__file__).parents[1] / ".cache" / "perf_analyzer"

Loop = Literal["closed", "open"]

# perf_analyzer reports over its three latest windows. With its own limit out of the way it stops after exactly three,
# and an unsteady measurement is a row that says so; within its limit such a row is not written at all (seen, 2.50).
NUM_WINDOWS = 3
_ANY_DEVIATION_PERCENT = 100_000
# Two threads send asynchronously whatever the concurrency, so that the generator does not crowd out a server beside it.
_NUM_THREADS = 2
_SLACK_S = 120
_COLUMNS = ("p50", "p90", "p95", "p99")
# They add up to the average latency, which the CSV leaves out when stability is judged by a percentile.
_PARTS = (
    "Client Send",
    "Network+Server Send/Recv",
    "Server Queue",
    "Server Compute Input",
    "Server Compute Infer",
    "Server Compute Output",
    "Client Recv",
)
_WINDOW = re.compile(r"^\s*Pass \[\d+\] throughput: ([\d.e+-]+) infer/sec\. .*latency: (\d+) usec", re.MULTILINE)
_DELAYED = re.compile(r"([\d.]+)% of the requests were delayed")
# The second of a part of the ensemble: Triton's statistics did not change within a window.
_TOO_FEW = re.compile(r"[Nn]o valid requests recorded|failed to find the requested model version")
_REFUSED = re.compile(r"[Ee]xceeds maximum queue size")


@dataclass(frozen=True)
class Analyzer:
    """A perf_analyzer that runs here; `libraries` is where what it links against lies, None for the system's."""

    binary: Path
    libraries: Path | None
    origin: str

    def environment(self) -> dict[str, str]:
        if self.libraries is None:
            return dict(os.environ)
        paths = [str(self.libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(paths)}


@dataclass(frozen=True)
class Load:
    """What one perf_analyzer sends: so many requests kept under way, or Poisson arrivals at so many a second."""

    model: str
    input_path: Path
    loop: Loop
    level: float
    window_s: float
    percentile: int


@dataclass(frozen=True)
class Window:
    """One measurement window: requests answered per second, and latency at the scenario's percentile."""

    throughput: float
    latency_ms: float


@dataclass(frozen=True)
class Measurement:
    """One run of perf_analyzer over three windows.

    Attributes:
        throughput: answers per second.
        latency_ms: "avg", "p50", "p90", "p95", "p99", from sending to the answer.
        delayed: fraction of requests that were sent late, so that the rate was not the one asked for.
        failure: why there is no measurement, which is then empty.
    """

    throughput: float
    latency_ms: Mapping[str, float]
    windows: tuple[Window, ...]
    delayed: float = 0.0
    failure: str = ""

    def unsteadiness(self) -> float:
        """Largest over smallest window, less 1: of throughput or latency, whichever varies more."""
        series = ([one.throughput for one in self.windows], [one.latency_ms for one in self.windows])
        return max((max(each) / min(each) - 1 if min(each) > 0 else float("inf") for each in series if each), default=0)


def find_analyzer() -> Analyzer:
    """The perf_analyzer on PATH, or the one that was fetched.

    Raises:
        MissingDependency: there is none, or it does not run.
    """
    on_path = shutil.which(BINARY)
    if on_path is not None and _runs(found := Analyzer(Path(on_path), None, on_path)):
        return found
    if not (ANALYZER_DIR / BINARY).exists():
        raise MissingDependency("perf_analyzer is not here: run `make perf-analyzer`")
    return find_in(ANALYZER_DIR)


def find_in(folder: Path) -> Analyzer:
    """The perf_analyzer that perf.fetch_analyzer put there.

    Raises:
        MissingDependency: it does not run.
    """
    origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["perf_analyzer"]
    analyzer = Analyzer((folder / BINARY).absolute(), folder.absolute(), origin)
    if not _runs(analyzer):
        raise MissingDependency(f"{folder / BINARY} does not run on this system; `make perf-analyzer` fetches it anew")
    return analyzer


def _runs(analyzer: Analyzer) -> bool:
    command = [str(analyzer.binary), "--version"]
    try:
        ended = subprocess.run(
            command, env=analyzer.environment(), capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ended.returncode == 0 and "Perf Analyzer" in ended.stdout + ended.stderr


def command_line(analyzer: Analyzer, load: Load, url: str, csv_path: Path) -> list[str]:
    """The whole command, which a report can print."""
    if load.loop == "closed":
        level = ["--concurrency-range", f"{load.level:g}"]
    else:
        level = ["--request-rate-range", f"{load.level:g}", "--request-distribution", "poisson"]
    return [
        *(str(analyzer.binary), "-m", load.model, "-u", url, "-i", "grpc", "--async"),
        *("--input-data", str(load.input_path), *level, "--max-threads", str(_NUM_THREADS)),
        *("--measurement-interval", str(round(load.window_s * 1000)), "--percentile", str(load.percentile)),
        *("--max-trials", str(NUM_WINDOWS), "--stability-percentage", str(_ANY_DEVIATION_PERCENT)),
        *("-v", "--verbose-csv", "-f", str(csv_path)),
    ]


class Running:
    """perf_analyzer at work; several may run side by side."""

    def __init__(self, analyzer: Analyzer, load: Load, url: str, csv_path: Path) -> None:
        self._load, self._csv_path = load, csv_path
        csv_path.parent.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            command_line(analyzer, load, url, csv_path),
            env=analyzer.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def finish(self) -> Measurement:
        """Wait for it; a run that gave no figures is a Measurement that says why."""
        try:
            printed, _ = self._process.communicate(timeout=NUM_WINDOWS * self._load.window_s + _SLACK_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return _failed(f"perf_analyzer was still not done {_SLACK_S} s after its windows")
        if self._process.returncode or not self._csv_path.exists():
            return _failed(explain_failure(printed))
        return read_measurement(self._csv_path, printed)

    def kill(self) -> None:
        """End it if it still runs; safe after finish()."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _failed(reason: str) -> Measurement:
    return Measurement(0.0, {}, (), failure=reason)


def explain_failure(printed: str) -> str:
    """One sentence from what perf_analyzer printed before it gave up."""
    if _REFUSED.search(printed):
        return "the server refused requests: its queue was full"
    if _TOO_FEW.search(printed):
        return "a window held no answer: make window_s longer"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fail|unknown|unable", line, re.IGNORECASE)]
    return f"perf_analyzer: {(telling or lines or ['it ended without a word'])[-1]}"


def read_measurement(csv_path: Path, printed: str) -> Measurement:
    """The row of the CSV, and the windows from what was printed beside it.

    Raises:
        InvalidInput: the file is not perf_analyzer's verbose CSV of one load.
    """
    with open(csv_path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if len(rows) != 1:
        raise InvalidInput(f"{csv_path}: {len(rows)} rows, expected one")
    try:
        throughput = float(rows[0]["Inferences/Second"])
        latency_ms = {"avg": sum(float(rows[0][part]) for part in _PARTS) / 1000}
        latency_ms |= {column: float(rows[0][f"{column} latency"]) / 1000 for column in _COLUMNS}
    except (KeyError, ValueError, TypeError) as error:
        raise InvalidInput(f"{csv_path}: not a verbose CSV of perf_analyzer: {error}") from None
    windows = tuple(Window(float(rate), int(latency) / 1000) for rate, latency in _WINDOW.findall(printed))
    delayed = _DELAYED.search(printed)
    return Measurement(throughput, latency_ms, windows, float(delayed[1]) / 100 if delayed else 0.0)
