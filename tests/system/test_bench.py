"""`tuwen bench run` on the real server with the real perf_analyzer, `tuwen bench towers` on the sample."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tuwen_client import Client

from perf.analyzer import Analyzer, Load, Measurement, Running, find_analyzer
from perf.bench import BenchFailed, find_target, run_bench
from perf.scenario import SCENARIOS_DIR
from perf.stages import measure_stages, read_statistics, settle
from perf.summary import Summary, read_summary, write_summary
from perf.towers import measure_towers, texts_of_length
from tests.system.conftest import SAMPLE_CHECKPOINT, some_ports
from tuwen.errors import InvalidInput, MissingDependency
from tuwen.model import ChineseCLIP
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton

IN_FLIGHT = 16
TUWEN = [sys.executable, "-m", "tuwen.cli"]


@pytest.fixture(scope="module")
def analyzer() -> Analyzer:
    for package in ("matplotlib", "scipy", "skimage", "sklearn"):
        pytest.importorskip(package)
    try:
        return find_analyzer()
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sample_server(sample_repository: Path) -> Iterator[EmbeddedServer]:
    """Without the cache of answers: perf_analyzer sends the same texts again and again."""
    ports = some_ports()
    with EmbeddedServer(
        sample_repository,
        grpc_port=ports.grpc,
        http_port=ports.http,
        metrics_port=ports.metrics,
        cache_size_bytes=0,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def smoke_dir(sample_server: EmbeddedServer, analyzer: Analyzer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the smoke scenario, run as a person does."""
    out = tmp_path_factory.mktemp("bench") / "smoke"
    endpoints = sample_server.endpoints
    arguments = ["bench", "run", "smoke", "--url", endpoints.grpc, "--metrics-url", endpoints.metrics]
    ended = subprocess.run(
        [*TUWEN, *arguments, "--out", str(out)], capture_output=True, text=True, timeout=180, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert (ended.stdout, ended.stderr) == (f"{out}\n", "")
    return out


@pytest.fixture
def smoke(smoke_dir: Path) -> Summary:
    return read_summary(smoke_dir)


def test_every_load_is_measured_as_often_as_asked(smoke: Summary) -> None:
    assert [point.name for point in smoke.points] == ["closed 2", "closed 4", "open 0.5 of capacity"]
    assert smoke.points[1].levels == {"text": 3, "image": 1}
    for point in smoke.points:
        for stream in ("text", "image"):
            measured = point.measured(stream)
            assert len(measured) == 2, point
            for one in measured:
                assert one.throughput > 0
                assert len(one.windows) == 3
                quantiles = [one.latency_ms[which] for which in ("p50", "p90", "p95", "p99")]
                assert quantiles == sorted(quantiles)
                assert quantiles[0] > 0


def test_the_open_loop_asks_for_half_of_what_the_closed_loop_reached(smoke: Summary) -> None:
    for stream, capacity in smoke.capacity.items():
        assert smoke.points[2].levels[stream] == pytest.approx(capacity / 2, rel=0.01)


def test_the_servers_own_times_are_kept(smoke: Summary) -> None:
    """Of the ensembles' parts; every request that perf_analyzer counted went through them."""
    for point in smoke.points:
        for repeat in point.repeats:
            parts = {stage.model: stage for stage in repeat.stages}
            assert set(parts) == {"preprocess_image_64", "tiny_rn_image_tower", "tokenize_text", "tiny_rn_text_tower"}
            assert all(stage.infer_ms > 0 and stage.mean_batch >= 1 for stage in parts.values())
            measured_s = 3 * smoke.scenario.measure.window_s
            assert parts["tiny_rn_text_tower"].requests >= 0.9 * repeat.streams["text"].throughput * measured_s
            assert repeat.refused == 0
    assert smoke.own_counters


def test_the_folder_holds_what_was_found(smoke_dir: Path, smoke: Summary) -> None:
    assert {path.name for path in smoke_dir.iterdir()} == {"csv", "summary.json", "curves.png", "report.html"}
    files = {file for point in smoke.points for repeat in point.repeats for file in repeat.csv.values()}
    assert {str(path.relative_to(smoke_dir)) for path in (smoke_dir / "csv").iterdir()} == files
    assert len(files) == 12
    first = (smoke_dir / smoke.points[0].repeats[0].csv["text"]).read_text(encoding="utf-8")
    assert first.startswith("Concurrency,Inferences/Second,Client Send")
    assert [path.name for path in smoke_dir.parent.iterdir()] == ["smoke"]


def test_the_run_tells_what_it_holds_for(smoke: Summary, sample_repository: Path) -> None:
    record = json.loads((sample_repository / "tiny_rn_text_tower" / "1" / "build.json").read_text(encoding="utf-8"))
    assert (smoke.model, smoke.fingerprint) == ("tiny_rn", record["fingerprint"])
    assert smoke.versions["triton server"].startswith("2.")
    assert smoke.versions["perf_analyzer"]
    assert smoke.machine["cores"] >= 1


def bench_compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TUWEN, "bench", "compare", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_run_does_not_differ_from_itself(smoke_dir: Path) -> None:
    ended = bench_compare(smoke_dir, smoke_dir / "summary.json", "--fail-on-regression", "--json")
    assert ended.returncode == 0, ended.stderr
    findings = json.loads(ended.stdout)["findings"]
    assert len(findings) == 2 * (2 * 3 + 2)  # kinds of request; figures of two closed loops and of an open one
    assert {one["verdict"] for one in findings} == {"no difference beyond noise"}


def slowed(one: Measurement, factor: float) -> Measurement:
    latency_ms = {which: value * factor for which, value in one.latency_ms.items()}
    return replace(one, throughput=one.throughput / factor, latency_ms=latency_ms)


def test_fail_on_regression_exits_1(smoke: Summary, tmp_path: Path) -> None:
    """The first repeat of each load three times over, as it was and at half the speed."""
    for name, factor in (("before", 1), ("after", 2)):
        points = []
        for point in smoke.points:
            first = point.repeats[0]
            streams = {stream: slowed(one, factor) for stream, one in first.streams.items()}
            points.append(replace(point, repeats=(replace(first, streams=streams),) * 3))
        (tmp_path / name).mkdir()
        write_summary(replace(smoke, points=tuple(points)), tmp_path / name)
    for flags, status in (([], 0), (["--fail-on-regression"], 1)):
        ended = bench_compare(tmp_path / "before", tmp_path / "after", *flags)
        assert ended.returncode == status, ended.stderr
        assert ended.stdout.count("slower") == 2 * (2 * 3 + 2)
    assert bench_compare(tmp_path / "after", tmp_path / "before", "--fail-on-regression").returncode == 0


def test_a_refusing_server_is_a_row_without_figures(
    sample_repository: Path, analyzer: Analyzer, tmp_path: Path
) -> None:
    """Above capacity a short queue is full at once, and perf_analyzer ends without a CSV.

    Different texts, as a repeated one soon comes out of the cache. Not many times more than are answered: perf_analyzer
    waits for all that it has sent, which took from 20 s to minutes at 50,000 a second.
    """
    repository = tmp_path / "repository"
    shutil.copytree(sample_repository, repository)
    config = repository / "tiny_rn_text_tower" / "config.pbtxt"
    config.write_text(config.read_text(encoding="utf-8").replace('"128"', '"1"'), encoding="utf-8")
    data = tmp_path / "input.json"
    texts = [{"text": [f"第{number}只猫"]} for number in range(2000)]
    data.write_text(json.dumps({"data": texts}), encoding="utf-8")
    load = Load("tiny_rn_text", data, "open", 2_000, 0.5, 95)
    with some_ports().serve(repository) as server:
        found = Running(analyzer, load, server.endpoints.grpc, tmp_path / "out.csv").finish()
    assert found.failure == "the server refused requests: its queue was full"
    assert (found.throughput, found.windows) == (0, ())


def test_no_server_is_one_sentence(analyzer: Analyzer, tmp_path: Path) -> None:
    url = f"127.0.0.1:{some_ports().grpc}"
    with pytest.raises(BenchFailed, match=f"no server answers at {url}"):
        run_bench(SCENARIOS_DIR / "smoke.toml", url, "http://127.0.0.1:9/metrics", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_model_is_one_sentence(sample_server: EmbeddedServer) -> None:
    endpoints = sample_server.endpoints
    with pytest.raises(BenchFailed, match=r"serves no vit_l_14_text; it has tiny_rn$"):
        find_target(endpoints.grpc, endpoints.metrics, "vit_l_14", ["text"])


def test_times_in_the_server_are_those_of_its_queues(sample_server: EmbeddedServer) -> None:
    """Three quantities that the load bounds, whatever the machine: requests, their waits, the time of the batches."""
    endpoints = sample_server.endpoints
    settle()
    before = read_statistics(endpoints.grpc, endpoints.metrics)
    started = time.perf_counter()
    with Client(endpoints.grpc, max_in_flight=IN_FLIGHT) as client:
        client.embed_text([f"第{number}个没问过的句子" for number in range(300)])
    wall_ms = (time.perf_counter() - started) * 1000
    settle()
    after = read_statistics(endpoints.grpc, endpoints.metrics)
    (tower,) = measure_stages(before, after, ["tiny_rn_text_tower"])
    assert tower.requests == 300
    assert 1 <= tower.mean_batch <= IN_FLIGHT
    assert 0 < tower.queue_ms * tower.requests <= IN_FLIGHT * wall_ms
    assert 0 < tower.infer_ms * tower.requests / tower.mean_batch <= wall_ms  # one batch at a time
    (by_triton,) = measure_stages(replace(before, counters={}), replace(after, counters={}), ["tiny_rn_text_tower"])
    assert tower.input_ms == pytest.approx(
        by_triton.queue_ms + by_triton.input_ms + by_triton.infer_ms + by_triton.output_ms
    )


def test_a_server_without_counters_is_warned_of(
    sample_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    endpoints = sample_server.endpoints
    assert find_target(endpoints.grpc, endpoints.metrics, None, ["text"]).metrics_url == endpoints.metrics
    assert not caplog.messages
    for url, reason in (
        (f"http://127.0.0.1:{some_ports().metrics}/metrics", "no metrics at http://127.0.0.1:"),
        (f"{endpoints.http}/v2", "tells no counters of tiny_rn;"),
        ("gpu-box", "no metrics at gpu-box: unknown url type"),
    ):
        caplog.clear()
        target = find_target(endpoints.grpc, url, None, ["text"])
        assert target.metrics_url is None
        assert reason in "".join(caplog.messages)
        assert target.read_statistics().counters == {}


def test_a_folder_that_is_no_run_is_not_overwritten(
    sample_server: EmbeddedServer, analyzer: Analyzer, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").touch()
    endpoints = sample_server.endpoints
    with pytest.raises(InvalidInput, match="choose another --out"):
        run_bench(SCENARIOS_DIR / "smoke.toml", endpoints.grpc, endpoints.metrics, out=tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_towers_are_timed_with_parity_beside(tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(SAMPLE_CHECKPOINT), "--batch", "1,2", "--lengths", "9", "--rounds", "2"]
    command = [*TUWEN, "bench", "towers", *arguments, "--threads", "1", "--out", str(tmp_path), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found == json.loads((tmp_path / "towers.json").read_text(encoding="utf-8"))
    assert (found["architecture"], found["threads"]) == ("Tiny-RN", 1)
    cpu = ["PyTorch", "ONNX Runtime fp32", "ONNX Runtime int8"]
    keys = [(one["tower"], one["batch"], one["length"], one["side"]) for one in found["times"]]
    for tower, length in (("text", 9), ("image", None)):
        for batch in (1, 2):
            assert [side for *key, side in keys if key == [tower, batch, length]][:3] == cpu
    assert all(0 < one["min_ms"] <= one["median_ms"] <= one["max_ms"] for one in found["times"])
    parity = {(one["tower"], one["side"]): one for one in found["parity"]}
    for tower in ("text", "image"):
        assert parity[tower, "PyTorch"]["max_abs_diff"] == 0
        assert parity[tower, "ONNX Runtime fp32"]["max_abs_diff"] < 1e-5
        assert 0.995 < parity[tower, "ONNX Runtime int8"]["min_cosine"] < 1
        assert parity[tower, "ONNX Runtime int8"]["num_items"] == 32


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"batches": [0]}, "--batch 0: expected 1 to 32"),
        ({"lengths": [2]}, "--lengths 2: expected 3 to 52"),
        ({"rounds": 0}, "--rounds 0: expected 1 to 1000"),
    ],
)
def test_towers_refuse_what_cannot_be(flags: dict[str, object], reason: str, sample_model: ChineseCLIP) -> None:
    with pytest.raises(InvalidInput, match=reason):
        measure_towers(sample_model, "sample", **flags)  # type: ignore[arg-type]


def test_texts_to_time_have_exactly_the_length_asked_for() -> None:
    rows = texts_of_length(3, 12)
    assert [len(row) for row in rows] == [12, 12, 12]
    assert not np.array_equal(rows[0], rows[1])
