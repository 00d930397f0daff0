"""What `python -m perf.coreml` says of what it measured."""

from __future__ import annotations

from typing import Any

import pytest

from perf.coreml import as_markdown, failures


def measured(precision: str, packages: float) -> dict[str, Any]:
    tower = {
        "size_bytes": 3_456_000, "operations": {"conv": 31, "cast": 2}, "min_cosine": 0.99951, "max_abs_diff": 2.5e-4,
        "max_length_error": 1e-4, "num_items": 17,
    }  # fmt: skip
    one = {"towers": {"image": tower, "text": tower}, "recall_at_10": {"packages": packages, "pytorch": 0.627}}
    return {f"sample {precision}": one}


@pytest.mark.parametrize(
    ("precision", "packages", "is_refused"),
    [
        ("fp16", 0.6221, False), ("fp16", 0.6219, True), ("palette8", 0.6121, False), ("palette8", 0.6119, True),
        ("fp32", 0.6264, True), ("palette6", 0.5, False),
    ],
)  # fmt: skip
def test_a_recall_that_falls_too_far_fails(precision: str, packages: float, is_refused: bool) -> None:
    said = failures(measured(precision, packages))
    assert bool(said) is is_refused
    if said:
        assert said[0].startswith(f"{precision}: recall@10 {packages:.1%}, PyTorch's 62.7%")


def test_the_tables_say_what_was_not_run() -> None:
    results = {"minimum_ios": 16, "machine": {"torch": "2.13.0"}, "found": measured("fp16", 0.628)}
    tables = as_markdown(results)
    assert "| sample | fp16 | 3.5 | 3.5 | 0.999510 | 0.999510 | 2.5e-04 | 17 + 17 |" in tables
    assert "| fp16 | 62.80% | 62.70% | +0.10 | 0.5 |" in tables
    assert "| sample | image | 31 conv, 2 cast |" in tables
    assert "Not run: sample fp32," in tables
    assert "not of Apple's hardware" in tables
