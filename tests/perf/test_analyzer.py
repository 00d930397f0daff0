"""What perf_analyzer 2.50 wrote and printed here, read back; and the input files it is given."""

from __future__ import annotations

import base64
import io
import json
import statistics
from pathlib import Path

import pytest
from PIL import Image

from perf.analyzer import Measurement, Window, explain_failure, find_analyzer, read_measurement
from perf.input_data import write_inputs
from perf.scenario import SCENARIOS_DIR, load_scenario
from tuwen.errors import InvalidInput, MissingDependency

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> Measurement:
    return read_measurement(RECORDED / f"{name}.csv", (RECORDED / f"{name}.txt").read_text(encoding="utf-8"))


def test_a_closed_loop_is_read() -> None:
    found = recorded("closed_16")
    assert found.throughput == 529.411
    assert {key: found.latency_ms[key] for key in ("p50", "p90", "p95", "p99")} == {
        "p50": 10.476, "p90": 33.513, "p95": 130.693, "p99": 689.667,
    }  # fmt: skip
    # perf_analyzer printed 28,915 us; the CSV's parts add up to it but for their rounding to whole microseconds.
    assert found.latency_ms["avg"] == pytest.approx(28.915, abs=0.02)
    assert found.windows == (Window(78.4713, 717.053), Window(786.434, 73.757), Window(683.165, 195.698))
    assert found.delayed == 0
    assert not found.failure


def test_unsteadiness_is_of_the_worse_of_throughput_and_latency() -> None:
    assert recorded("closed_16").unsteadiness() == pytest.approx(786.434 / 78.4713 - 1)
    even = Measurement(1, {}, (Window(100, 5), Window(110, 6), Window(105, 5)))
    assert even.unsteadiness() == pytest.approx(0.2)


def test_late_requests_of_an_open_loop_are_told() -> None:
    found = recorded("poisson_100")
    assert found.delayed == pytest.approx(0.0946)
    assert found.throughput == 87.2472
    assert len(found.windows) == 3


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "Inferences/Second\n\n", "Inferences/Second\n1\n2\n"])
def test_another_csv_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"some\.csv: "):
        read_measurement(path, "")


@pytest.mark.parametrize(
    ("printed", "sentence"),
    [
        (
            "Failed to retrieve results from inference request.\nThread [0] had error: in ensemble 'tiny_rn_text', "
            "[request id: 60] Exceeds maximum queue size\n\n",
            "the server refused requests: its queue was full",
        ),
        (
            "error: failed to get model metadata: Request for unknown model: 'nope' is not found\n\n",
            "perf_analyzer: error: failed to get model metadata: Request for unknown model: 'nope' is not found",
        ),
        (
            "failed to find the requested model version\n",
            "a window held no answer: make window_s longer",
        ),
        ("", "perf_analyzer: it ended without a word"),
    ],
)
def test_a_failure_is_one_sentence(printed: str, sentence: str) -> None:
    """The printed words are those of 2.50, recorded here."""
    assert explain_failure(printed) == sentence


def test_without_perf_analyzer_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("perf.analyzer.ANALYZER_DIR", tmp_path / "nowhere")
    with pytest.raises(MissingDependency, match=r"run `make perf-analyzer`$"):
        find_analyzer()


def test_inputs_are_what_the_scenario_states(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    scenario, _ = load_scenario(SCENARIOS_DIR / "smoke.toml")
    paths = write_inputs(scenario, tmp_path)
    first = {kind: path.read_bytes() for kind, path in paths.items()}
    texts = [entry["text"] for entry in json.loads(first["text"])["data"]]
    assert [len(row) for row in texts] == [1] * 20
    images = json.loads(first["image"])["data"]
    sizes = []
    for entry in images:
        jpeg = base64.b64decode(entry["image"]["content"]["b64"])
        assert entry["image"]["shape"] == [len(jpeg)]
        sizes.append(Image.open(io.BytesIO(jpeg)).size)
    assert (sizes.count((64, 48)), sizes.count((224, 168))) == (4, 2)
    assert {kind: path.read_bytes() for kind, path in write_inputs(scenario, tmp_path).items()} == first


def test_query_lengths_are_the_stated_distribution(tmp_path: Path) -> None:
    scenario, _ = load_scenario(SCENARIOS_DIR / "text.toml")
    path = write_inputs(scenario, tmp_path)["text"]
    lengths = [len(entry["text"][0]) for entry in json.loads(path.read_text(encoding="utf-8"))["data"]]
    assert len(lengths) == 500
    assert statistics.median(lengths) == 6
    assert 1 <= min(lengths) < max(lengths) <= 50
