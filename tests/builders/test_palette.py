"""Palettes of weights, against an exact search."""

from __future__ import annotations

import numpy as np
import pytest

from builders.palette import fit_palette


def squared_error(weights: np.ndarray, palette: np.ndarray, indices: np.ndarray) -> float:
    return float(np.square(palette[indices].astype(float) - weights.reshape(-1).astype(float)).mean())


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("kind", ["normal", "heavy_tails", "two_humps"])
def test_the_error_is_nearly_the_least_there_is(size: int, kind: str) -> None:
    """coremltools brings an exact search along."""
    kmeans = pytest.importorskip("coremltools._deps.kmeans1d", reason="pip install 'tuwen[coreml]'")
    random = np.random.default_rng(0)
    values = {
        "normal": random.standard_normal(20_000),
        "heavy_tails": random.standard_t(3, 20_000),
        "two_humps": np.concatenate([random.normal(-3, 0.1, 10_000), random.normal(1, 1, 10_000)]),
    }[kind]
    weights = (0.02 * values).astype(np.float16).reshape(100, 200)
    found = squared_error(weights, *fit_palette(weights, size))
    present, counts = np.unique(weights, return_counts=True)
    best = kmeans.cluster(present, size, weights=counts)
    exact = np.array(best.centroids).astype(np.float16)[np.array(best.clusters)].astype(float)
    least = np.average(np.square(exact - present.astype(float)), weights=counts)
    assert found <= 1.15 * least


def test_each_weight_has_its_nearest_value() -> None:
    weights = np.random.default_rng(0).standard_normal((30, 40)).astype(np.float16)
    palette, indices = fit_palette(weights, 16)
    assert (palette.dtype, palette.shape, indices.dtype) == (np.float16, (16,), np.uint8)
    distances = np.abs(weights.reshape(-1, 1).astype(float) - palette.astype(float))
    assert np.array_equal(distances[np.arange(1200), indices], distances.min(axis=1))


@pytest.mark.parametrize("values", [[0.5], [0.0, -0.0, 1.0], [-2.0, 3.0, 65504.0, 6e-8]])
def test_few_values_are_kept_exactly(values: list[float]) -> None:
    weights = np.array(values * 5, np.float16)
    palette, indices = fit_palette(weights, 64)
    assert np.array_equal(palette[indices], weights)
