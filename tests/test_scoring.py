"""Scores: calibration learns what cosines mean, classifiers survive their file, bad ones are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tuwen.errors import InvalidInput
from tuwen.scoring import (
    Classifier,
    average_prompts,
    fill_templates,
    fit_calibration,
    load_calibration,
    load_classifier,
    softmax,
)


def cosines(mean: float, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.05, count).astype(np.float32)


def test_a_calibration_puts_even_odds_between_two_equal_spreads() -> None:
    fitted = fit_calibration(cosines(0.5, 4000, 0), cosines(0.3, 20_000, 1), fingerprint=7)
    # Two normals of equal spread: log odds are (m1 - m0) / s^2 * (cosine - (m1 + m0) / 2), here 80 * (cosine - 0.4).
    assert -fitted.intercept / fitted.slope == pytest.approx(0.4, abs=0.005)
    assert fitted.slope == pytest.approx(80, rel=0.1)
    assert fitted.true_match_rate == pytest.approx(0.977, abs=0.015)  # two standard deviations
    assert fitted.false_match_rate == pytest.approx(0.023, abs=0.015)


def test_separated_pairs_give_a_finite_slope() -> None:
    fitted = fit_calibration(cosines(0.9, 100, 0), cosines(0.1, 100, 1), fingerprint=7)
    assert np.isfinite(fitted.slope)
    assert fitted.true_match_rate == 1
    assert fitted.false_match_rate == 0


@pytest.mark.parametrize(
    ("matching", "strangers", "sentence"), [(0.5, 0.5001, "no closer"), (0.2, 0.5, "no closer"), (None, 0.5, "too few")]
)
def test_what_cannot_be_calibrated_is_refused(matching: float | None, strangers: float, sentence: str) -> None:
    own = cosines(matching, 100, 0) if matching else np.zeros(3, np.float32)
    with pytest.raises(InvalidInput, match=sentence):
        fit_calibration(np.full_like(own, matching or 0), cosines(strangers, 100, 0) * 0 + np.float32(strangers), 7)


def test_a_calibration_reads_back(tmp_path: Path) -> None:
    fitted = fit_calibration(cosines(0.5, 100, 0), cosines(0.3, 100, 1), fingerprint=2**62 + 1)
    fitted.save(tmp_path / "shop.json")
    assert load_calibration(tmp_path / "shop.json") == fitted


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"slope": "steep"}', "\x00"])
def test_a_broken_calibration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "shop.json").write_text(text)
    with pytest.raises(InvalidInput, match="calibration shop cannot be read"):
        load_calibration(tmp_path / "shop.json")


def test_a_classifier_reads_back(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    Classifier(("猫", "狗"), vectors, 2**62 + 1, ("{}的照片",)).save(tmp_path / "pets.safetensors")
    found = load_classifier(tmp_path / "pets.safetensors")
    assert (found.labels, found.fingerprint, found.templates) == (("猫", "狗"), 2**62 + 1, ("{}的照片",))
    assert np.array_equal(found.text_embeds, vectors)


def test_labels_and_vectors_must_be_as_many(tmp_path: Path) -> None:
    Classifier(("猫",), np.zeros((2, 8), np.float32), 7, ()).save(tmp_path / "pets.safetensors")
    with pytest.raises(InvalidInput, match=r"1 labels, but vectors \(2, 8\)"):
        load_classifier(tmp_path / "pets.safetensors")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, json.dumps({"a": 1}).encode()])
def test_a_broken_classifier_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pets.safetensors").write_bytes(content)
    with pytest.raises(InvalidInput, match="classifier pets cannot be read"):
        load_classifier(tmp_path / "pets.safetensors")


def test_prompts_are_averaged_by_label() -> None:
    assert fill_templates(["猫", "狗"], ["{}", "一只{}"]) == ["猫", "一只猫", "狗", "一只狗"]
    averaged = average_prompts(np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32), 2)
    assert averaged == pytest.approx(np.array([[0.5**0.5, 0.5**0.5], [1, 0]]))


def test_softmax_is_finite_for_large_logits() -> None:
    assert softmax(np.array([[1000.0, 1000.0]], np.float32)).tolist() == [[0.5, 0.5]]
