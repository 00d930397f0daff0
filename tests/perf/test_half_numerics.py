"""The numerics table on a small model: a row per tower and precision, and outliers that stress what they should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from builders.half_numerics import MIN_HALF_COSINE
from perf.half_numerics import OUTLIER_BIAS, add_outliers, measure, random_model
from tuwen.specs import SPECS


@pytest.mark.usefixtures("one_thread")
def test_a_row_per_tower_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outliers of trained models' size are seen in both towers; float16 stays within its bound."""
    spec = replace(SPECS["Tiny-ViT"], vision=replace(SPECS["Tiny-ViT"].vision, layers=3))
    monkeypatch.setitem(SPECS, "Tiny-ViT", spec)
    model = random_model("Tiny-ViT")
    add_outliers(model)
    rows = list(measure("Tiny-ViT", "outliers", model, items=2))
    assert [(row.kind, row.dtype) for row in rows] == [
        ("text", "fp16"), ("text", "bf16"), ("image", "fp16"), ("image", "bf16")
    ]  # fmt: skip
    for row in rows:
        assert row.largest.largest > (0.9 * OUTLIER_BIAS if row.kind == "image" else 20), row
        assert row.parity.min_cosine >= (MIN_HALF_COSINE if row.dtype == "fp16" else 0.99), row
        assert row.markdown().count("|") == 8


def test_nothing_of_a_resnet_is_hidden() -> None:
    """A block of a new ResNet is the identity, its last gain being 0: here none is."""
    model = random_model("Tiny-RN")
    gains = [value for name, value in model.visual.named_parameters() if name.endswith("bn3.weight")]
    assert gains
    assert all((gain.abs() > 0.1).all() for gain in gains)
    add_outliers(model)
    assert all(gain[7:9].min() > 4 > gain[9:].max() for gain in gains)
    assert torch.isfinite(model.visual.layer4[0].bn3.running_var).all()
