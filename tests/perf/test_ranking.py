"""perf.ranking at a size that takes seconds: both sides run, and what is missed is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perf.published_scripts import published_script
from perf.ranking import Measured, measure, report
from tuwen.errors import MissingDependency


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    try:
        published_script("evaluation")
    except MissingDependency as error:
        pytest.skip(str(error))
    return measure(tmp_path_factory.mktemp("ranking"), num_queries=40, num_items=300, share=20)


def test_both_sides_find_the_same(measured: Measured) -> None:
    assert measured.num_different == 0
    assert measured.score == measured.published_score
    assert measured.score["r1"] > 50
    assert all("times faster" in sentence for sentence in measured.missed)  # a speed is not for a test to demand


def test_what_is_missed_is_said(measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    fast = replace(measured, published_ranking_s=1e6)
    assert fast.missed == []
    report(fast)
    assert "cn_clip's ranking is that of 20 queries, times 2" in capsys.readouterr().out
    assert replace(fast, peak_rss_bytes=3 * 10**9).missed == ["3.00 GB, expected at most 2"]
    assert replace(fast, num_different=3).missed == ["3 of 20 queries with other predictions"]
    assert len(replace(measured, published_ranking_s=0, published_loading_s=0, score={}).missed) == 2
