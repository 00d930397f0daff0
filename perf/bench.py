"""Drive perf_analyzer through a scenario: `tuwen bench run text --serve`.

scenario + server -> a folder with perf_analyzer's CSVs, summary.json, curves.png and report.html.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from perf.analyzer import NUM_WINDOWS, Analyzer, Load, Loop, Running, find_analyzer
from perf.curves import check_matplotlib
from perf.input_data import write_inputs
from perf.report import write_report
from perf.rounds import machine
from perf.scenario import Scenario, StreamKind, load_scenario
from perf.stages import MetricsUnavailable, Statistics, measure_stages, read_counters, read_statistics, settle
from perf.summary import FILE_NAME, FORMAT, Point, Repeat, Summary, read_summary, write_summary
from perf.workload import encode_jpeg, photographs
from tuwen import __version__
from tuwen.errors import InvalidInput, TuwenError
from tuwen.files import replace_folder

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int, str], None]


class BenchFailed(TuwenError):
    """The server does not answer as it must for a measurement; the message says how."""


@dataclass(frozen=True)
class Target:
    """A server and the model measured there; `metrics_url` is None if its models tell no counters of their own."""

    url: str
    metrics_url: str | None
    model: str
    fingerprint: int
    server_version: str

    def ensemble(self, stream: StreamKind) -> str:
        return f"{self.model}_{stream}"

    def ensembles(self, stream: StreamKind) -> set[str]:
        """The one that clients call, and those within it."""
        return {self.ensemble(stream)} | ({f"{self.model}_text_cached"} if stream == "text" else set())

    def read_statistics(self) -> Statistics:
        return read_statistics(self.url, self.metrics_url)


@dataclass(frozen=True)
class Bench:
    """What all measurements of one run share."""

    analyzer: Analyzer
    scenario: Scenario
    target: Target
    inputs: Mapping[StreamKind, Path]
    folder: Path

    def load(self, stream: StreamKind, loop: Loop, level: float, window_s: float) -> Load:
        return Load(
            self.target.ensemble(stream), self.inputs[stream], loop, level, window_s, self.scenario.measure.percentile
        )

    def measure(self, point: Point, number: int) -> Repeat:
        """One repeat of a point: the streams' perf_analyzers side by side."""
        files = {stream: f"csv/{_slug(point.name)}.{stream}.{number}.csv" for stream in point.levels}
        before = self.target.read_statistics()
        running = {
            stream: Running(
                self.analyzer,
                self.load(stream, point.loop, level, self.scenario.measure.window_s),
                self.target.url,
                self.folder / files[stream],
            )
            for stream, level in point.levels.items()
        }
        try:
            found = {stream: one.finish() for stream, one in running.items()}
        finally:
            for one in running.values():
                one.kill()
        settle()
        after = self.target.read_statistics()
        ensembles = set().union(*map(self.target.ensembles, point.levels))
        parts = [name for name in sorted(before.models) if name not in ensembles and _asked(before, after, name)]
        return Repeat(
            streams=found,
            csv={stream: file for stream, file in files.items() if not found[stream].failure},
            stages=tuple(measure_stages(before, after, parts)),
            refused=sum(_increase(before, after, self.target.ensemble(stream), "fail") for stream in point.levels),
            cache_hits=sum(_increase(before, after, name, "cache_hit") for name in before.models),
        )

    def warm_up(self) -> None:
        """The heaviest closed loop for a while, unrecorded: threads, allocators and caches settle."""
        measure = self.scenario.measure
        if not measure.warm_up_s:
            return
        quick = measure.model_copy(update={"window_s": measure.warm_up_s / NUM_WINDOWS})
        point = closed_points(self.scenario)[-1]
        with tempfile.TemporaryDirectory() as name:
            bench = replace(self, scenario=self.scenario.model_copy(update={"measure": quick}), folder=Path(name))
            bench.measure(point, 0)  # of a slow model a window may hold no answer, and there is nothing to read


def run_bench(
    scenario_path: Path,
    url: str,
    metrics_url: str,
    model: str | None = None,
    out: Path | None = None,
    rates_of: Path | None = None,
    on_progress: OnProgress = lambda done, total, what: None,
) -> Path:
    """Measure every load of the scenario; the folder that was written, whole or not at all.

    Args:
        metrics_url: the same server's; if it does not answer, all times inside the server are by Triton's statistics.
        model: which one, where several are served.
        out: by default runs/bench/DATE-NAME.
        rates_of: an earlier summary, whose arrival rates are used again instead of fractions of today's capacity.
    Raises:
        InvalidInput: the scenario, `rates_of` or `out` cannot be used.
        BenchFailed: no such server or model, or it cannot be measured.
        MissingDependency: perf_analyzer or matplotlib is not here.
    """
    scenario, scenario_text = load_scenario(scenario_path)
    rates = _rates_of(rates_of, scenario) if rates_of else None
    check_matplotlib()
    analyzer = find_analyzer()
    target = find_target(url, metrics_url, model, scenario.streams)
    started_at = time.strftime("%Y-%m-%d %H:%M:%S %z")
    out = out or Path("runs/bench") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{scenario.name}"
    _check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        work, folder = Path(name), Path(name, "run")
        folder.mkdir()
        bench = Bench(analyzer, scenario, target, write_inputs(scenario, work), folder)
        bench.warm_up()
        points, capacity = measure_points(bench, rates, on_progress)
        summary = Summary(
            format=FORMAT,
            started_at=started_at,
            scenario=scenario,
            scenario_text=scenario_text,
            model=target.model,
            fingerprint=target.fingerprint,
            url=url,
            own_counters=target.metrics_url is not None,
            machine=machine(),
            versions=_versions(analyzer, target),
            capacity=capacity,
            points=tuple(points),
        )
        write_summary(summary, folder)
        write_report(summary, folder)
        replace_folder(folder, out)
    return out


def measure_points(
    bench: Bench, rates: Sequence[Point] | None, on_progress: OnProgress
) -> tuple[list[Point], dict[StreamKind, float]]:
    """Every point `repeats` times, one round through all of them after the other, so that a slow minute of the machine
    does not fall on one point alone; and each stream's throughput in the best closed loop of the first round."""
    scenario = bench.scenario
    repeats = scenario.load.repeats
    closed = closed_points(scenario)
    total = repeats * (len(closed) + len(scenario.load.rates or scenario.load.capacity_fractions))
    found: dict[str, list[Repeat]] = {}

    def measure_round(points: Sequence[Point], number: int) -> None:
        for point in points:
            on_progress(sum(map(len, found.values())), total, point.name)
            found.setdefault(point.name, []).append(bench.measure(point, number))

    measure_round(closed, 1)
    capacity = _capacity(closed, found)
    points = [*closed, *(rates if rates is not None else open_points(scenario, capacity))]
    measure_round(points[len(closed) :], 1)
    for number in range(2, repeats + 1):
        measure_round(points, number)
    return [replace(point, repeats=tuple(found[point.name])) for point in points], capacity


def closed_points(scenario: Scenario) -> list[Point]:
    """Not yet measured."""
    return [
        Point(f"closed {level}", "closed", level, _split_concurrency(scenario, level), ())
        for level in sorted(scenario.load.concurrencies)
    ]


def _split_concurrency(scenario: Scenario, level: int) -> dict[StreamKind, float]:
    if scenario.kind != "mixed":
        return {scenario.kind: level}
    images = min(max(1, round(level * scenario.load.image_share)), level - 1)
    return {"text": level - images, "image": images}


def open_points(scenario: Scenario, capacity: Mapping[StreamKind, float]) -> list[Point]:
    """Not yet measured; rates to three digits."""
    points = []
    for rate in sorted(scenario.load.rates):
        share = scenario.load.image_share
        parts: dict[StreamKind, float] = {"text": 1 - share, "image": share} if scenario.kind == "mixed" else {}
        levels = {stream: _three_digits(rate * parts.get(stream, 1)) for stream in scenario.streams}
        points.append(Point(f"open {rate:g}/s", "open", rate, levels, ()))
    for fraction in sorted(scenario.load.capacity_fractions):
        levels = {stream: _three_digits(fraction * capacity[stream]) for stream in scenario.streams}
        points.append(Point(f"open {fraction:g} of capacity", "open", fraction, levels, ()))
    return points


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def _capacity(closed: Sequence[Point], found: Mapping[str, list[Repeat]]) -> dict[StreamKind, float]:
    measured = [found[point.name][0].streams for point in closed]
    whole = [streams for streams in measured if not any(one.failure for one in streams.values())]
    if not whole:
        raise BenchFailed(f"no closed loop could be measured: {next(iter(measured[0].values())).failure}")
    best = max(whole, key=lambda streams: sum(one.throughput for one in streams.values()))
    return {stream: one.throughput for stream, one in best.items()}


def _rates_of(path: Path, scenario: Scenario) -> list[Point]:
    """The open points of an earlier run of the same scenario, without its repeats."""
    earlier = read_summary(path)
    points = [replace(point, repeats=()) for point in earlier.points if point.loop == "open"]
    if earlier.scenario.kind != scenario.kind or [point.level for point in points] != sorted(
        scenario.load.rates or scenario.load.capacity_fractions
    ):
        raise InvalidInput(f"{path}: its rates are of another scenario, {earlier.scenario.name}")
    return points


def find_target(url: str, metrics_url: str, model: str | None, streams: Sequence[StreamKind]) -> Target:
    """Ask the server what it serves and embed one item of each kind.

    Raises:
        BenchFailed: no answer, no such model, or several to choose from.
    """
    try:
        with triton.InferenceServerClient(url) as server:
            version = str(server.get_server_metadata(client_timeout=10).version)
            served = {entry.name for entry in server.get_inference_statistics(client_timeout=10).model_stats}
            names = sorted(name.removesuffix("_text_tower") for name in served if name.endswith("_text_tower"))
            if model is None and len(names) != 1:
                raise BenchFailed(f"{url} serves {', '.join(names) or 'no model'}: choose one with --model")
            model = model or names[0]
            missing = [f"{model}_{stream}" for stream in streams if f"{model}_{stream}" not in served]
            if missing:
                raise BenchFailed(f"{url} serves no {missing[0]}; it has {', '.join(names) or 'no model'}")
            fingerprints = [_embed_one(server, f"{model}_{stream}", stream) for stream in streams]
    except InferenceServerException as error:
        raise BenchFailed(f"no server answers at {url}: {error.message()}") from error
    return Target(url, _with_counters(metrics_url, model), model, fingerprints[0], version)


def _with_counters(metrics_url: str, model: str) -> str | None:
    """`metrics_url`, if the model's towers tell their counters there; else None and a warning."""
    try:
        if read_counters(metrics_url).keys() & {f"{model}_text_tower", f"{model}_image_tower"}:
            return metrics_url
        reason = f"{metrics_url} tells no counters of {model}"
    except MetricsUnavailable as error:
        reason = str(error)
    log.warning("%s; of batches, queues and computation the report has what Triton sees, the hand-over", reason)
    return None


def _embed_one(server: triton.InferenceServerClient, ensemble: str, stream: StreamKind) -> int:
    """The fingerprint that comes with an answer."""
    if stream == "text":
        item = triton.InferInput("text", [1, 1], "BYTES")
        item.set_data_from_numpy(np.array([["猫".encode()]], dtype=object))
    else:
        jpeg = np.frombuffer(encode_jpeg(next(photographs())[1], (64, 48)), np.uint8)[None]
        item = triton.InferInput("image", list(jpeg.shape), "UINT8")
        item.set_data_from_numpy(jpeg)
    return int(server.infer(ensemble, [item], client_timeout=60).as_numpy("fingerprint").ravel()[0])


def _asked(before: Statistics, after: Statistics, name: str) -> bool:
    return bool(after.models[name].inference_count > before.models[name].inference_count)


def _increase(before: Statistics, after: Statistics, name: str, which: str) -> int:
    counts = (getattr(entry.models[name].inference_stats, which).count for entry in (after, before))
    return int(next(counts) - next(counts))


def _versions(analyzer: Analyzer, target: Target) -> dict[str, str]:
    found = {"tuwen": __version__, "triton server": target.server_version, "perf_analyzer": analyzer.origin}
    return found | ({"checkout": checkout} if (checkout := _checkout()) else {})


def _checkout() -> str | None:
    """The commit; None outside of a checkout, or without git, as in a container."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "describe", "--always", "--dirty"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    return ended.stdout.strip() if ended.returncode == 0 else None


def _check_out(out: Path) -> None:
    """A folder that is there is replaced only if it holds an earlier run."""
    if out.exists() and not (out / FILE_NAME).exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InvalidInput(f"{out} exists and is no earlier run of `tuwen bench run`: choose another --out")


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-per-")
