"""The verdicts of `tuwen bench compare`: how often they cry wolf, and what they catch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perf.compare import Verdict, compare, judge, ratio_of
from perf.summary import read_summary, write_summary
from tests.perf.runs import Figures, summary
from tuwen.errors import InvalidInput

pytest.importorskip("scipy")

TRIALS = 1000
STEADY: Sequence[Figures] = [(100, 10, 20), (101, 10.1, 20.5), (99, 9.9, 19.8)]


def scaled(rows: Sequence[Figures], throughput: float = 1, latency: float = 1) -> list[Figures]:
    return [(rate * throughput, p50 * latency, p99 * latency) for rate, p50, p99 in rows]


def share(verdict: Verdict, change: float, noise: float, repeats: int) -> float:
    """How often a throughput that changed by this factor gets the verdict, under log-normal noise of this spread."""
    random = np.random.default_rng(1)
    found = 0
    for _ in range(TRIALS):
        a, b = np.exp(random.normal(0, noise, (2, repeats)))
        found += judge(ratio_of(a, change * b), higher_is_better=True) == verdict
    return found / TRIALS


@pytest.mark.parametrize("repeats", [3, 5])
@pytest.mark.parametrize("noise", [0.01, 0.03, 0.1, 0.3])
def test_noise_alone_is_rarely_a_regression(noise: float, repeats: int) -> None:
    """A 99 % interval errs once in a hundred, half of it to either side; 1.2 % is three deviations above in 1,000."""
    assert share("slower", 1.0, noise, repeats) <= 0.012


@pytest.mark.parametrize(("noise", "repeats", "least"), [(0.03, 3, 0.95), (0.05, 5, 0.98)])
def test_a_loss_of_a_fifth_is_caught(noise: float, repeats: int, least: float) -> None:
    assert share("slower", 0.8, noise, repeats) >= least
    assert share("faster", 0.8, noise, repeats) == 0


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """99 %: within three deviations of a count over 1,000."""
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(TRIALS):
        a, b = np.exp(random.normal(0, 0.05, (2, 3)))
        ratio = ratio_of(a, 1.3 * b)
        covered += ratio.low <= 1.3 <= ratio.high
    assert 0.98 <= covered / TRIALS <= 0.999


def test_a_difference_below_the_minimum_is_none() -> None:
    """Repeats so alike that the interval leaves out 1 do not make 7 % a regression."""
    ratio = ratio_of([100, 100.1, 99.9], [93, 93.1, 92.9])
    assert ratio.high < 1
    assert judge(ratio, higher_is_better=True) == "no difference beyond noise"
    assert judge(ratio, higher_is_better=True, min_effect=0.05) == "slower"
    ratio = ratio_of([100, 100.1, 99.9], [88, 88.1, 87.9])
    assert judge(ratio, higher_is_better=True) == "slower"
    assert judge(ratio, higher_is_better=False) == "faster"


def test_identical_repeats_are_no_difference() -> None:
    assert judge(ratio_of([5, 5, 5], [5, 5, 5]), higher_is_better=True) == "no difference beyond noise"


def test_one_repeat_tells_nothing() -> None:
    ratio = ratio_of([100], [50])
    assert (ratio.value, ratio.low) == (pytest.approx(0.5), 0)
    assert judge(ratio, higher_is_better=True) == "too few repeats"


def test_every_figure_of_every_common_load_is_judged() -> None:
    a = summary({"closed 1": STEADY, "closed 16": STEADY, "open 0.5 of capacity": STEADY})
    b = summary(
        {"closed 1": STEADY, "closed 16": scaled(STEADY, 0.7, 1.4), "open 0.5 of capacity": scaled(STEADY, 1, 0.6)}
    )
    found = compare(a, b)
    verdicts = {(one.load, one.figure): one.verdict for one in found.findings}
    assert verdicts == {
        ("closed 1", "throughput"): "no difference beyond noise",
        ("closed 1", "p50"): "no difference beyond noise",
        ("closed 1", "p99"): "no difference beyond noise",
        ("closed 16", "throughput"): "slower",
        ("closed 16", "p50"): "slower",
        ("closed 16", "p99"): "slower",
        ("open 0.5 of capacity", "p50"): "faster",
        ("open 0.5 of capacity", "p99"): "faster",
    }
    assert found.has_regression
    assert not compare(a, a).has_regression
    assert found.warnings == ()
    throughput = next(one for one in found.findings if (one.load, one.figure) == ("closed 16", "throughput"))
    assert (throughput.a, throughput.b) == (100, pytest.approx(70))
    assert throughput.ratio.value == pytest.approx(0.7)
    assert throughput.ratio.low < 0.7 < throughput.ratio.high


def test_open_loops_at_other_rates_are_left_out() -> None:
    loads = {"closed 1": STEADY, "open 0.5 of capacity": STEADY}
    found = compare(summary(loads, level=50), summary(loads, level=60))
    assert {one.load for one in found.findings} == {"closed 1"}
    assert "50/s in A, 60/s in B" in found.warnings[0]
    assert "--rates-of A" in found.warnings[0]


def test_a_load_that_one_run_could_not_measure_is_told() -> None:
    full = "the server refused requests: its queue was full"
    found = compare(
        summary({"closed 1": STEADY, "open 1 of capacity": STEADY}),
        summary({"closed 1": STEADY, "open 1 of capacity": [full, full]}),
    )
    assert found.warnings == ("open 1 of capacity is left out: B could not measure it",)


def test_other_machines_and_versions_are_told() -> None:
    a = summary({"closed 1": STEADY})
    b = replace(a, machine={"cpu": "Other CPU", "cores": 2}, versions=a.versions | {"triton server": "2.52.0"})
    assert compare(a, b).warnings == (
        "the machines differ: cpu is Some CPU in A, Other CPU in B",
        "triton server is 2.51.0 in A, 2.52.0 in B",
    )


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="no load in common"):
        compare(summary({"closed 1": STEADY}), summary({"closed 2": STEADY}))


def test_a_summary_is_read_back_whole(tmp_path: Path) -> None:
    written = summary({"closed 1": STEADY, "open 1.1 of capacity": ["refused", (60, 30, 90)]})
    write_summary(written, tmp_path)
    assert read_summary(tmp_path) == written
    assert read_summary(tmp_path / "summary.json") == written
    values = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert values["points"][0]["medians"]["text"]["p50_ms"] == 10
    assert values["points"][1]["remarks"]["text"] == ["1 of 2: refused"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not JSON", "no JSON"),
        ("[]", "expected format tuwen-bench-1"),
        ('{"format": "tuwen-bench-0"}', "expected format tuwen-bench-1"),
        ('{"format": "tuwen-bench-1"}', "not a whole summary: started_at: Field required"),
    ],
)
def test_another_file_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput, match=rf"other\.json: .*{reason}"):
        read_summary(tmp_path / "other.json")


def test_a_missing_summary_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"summary\.json: there is no such summary"):
        read_summary(tmp_path)
