"""Comparing sides in one run."""

from __future__ import annotations

from functools import partial

from perf.rounds import alternate, median_difference, median_ratio


def test_sides_take_turns_and_every_other_round_goes_the_other_way() -> None:
    order: list[str] = []

    def measure(side: str) -> float:
        order.append(side)
        return float(len(order))

    found = alternate({side: partial(measure, side) for side in "abc"}, 3)
    assert "".join(order) == "abccbaabc"
    assert found == {"a": [1.0, 6.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 4.0, 9.0]}


def test_sides_are_compared_within_a_round() -> None:
    found = {"slow": [2.0, 20.0, 400.0], "quick": [1.0, 10.0, 100.0]}
    assert median_ratio(found, "slow", "quick") == 2.0
    assert median_difference(found, "slow", "quick") == 10.0
