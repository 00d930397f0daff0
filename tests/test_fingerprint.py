"""A model's identity: what is part of it, and what is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL_SPECS, random_model
from tuwen.fingerprint import model_fingerprint


def test_any_changed_weight_changes_the_fingerprint() -> None:
    """By as little as float32 can tell; every key counts."""
    model = random_model(SMALL_SPECS["vit"])
    seen = {model_fingerprint(model.spec, model.state_dict())}
    for key, value in model.state_dict().items():
        changed = value.clone()
        changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0))
        seen.add(model_fingerprint(model.spec, model.state_dict() | {key: changed}))
    assert len(seen) == 1 + len(model.state_dict())
    assert all(0 < fingerprint < 2**63 for fingerprint in seen)


def test_the_fingerprint_knows_weights_not_files() -> None:
    """The order of keys and a wider type of the same values change nothing; another setting does."""
    model = random_model(SMALL_SPECS["resnet"])
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    full = {key: half[key].float() if half[key].is_floating_point() else half[key] for key in reversed(half)}
    assert model_fingerprint(model.spec, half) == model_fingerprint(model.spec, full)
    other = replace(model.spec, vision=replace(model.spec.vision, head_width=64))  # fits the same weights
    assert model_fingerprint(model.spec, half) != model_fingerprint(other, half)


def test_vocabulary_and_transform_are_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Vectors of the same weights behind another tokenizer are others."""
    spec, weights = SMALL_SPECS["vit"], {"text_projection": torch.ones(2, 2)}
    seen = {model_fingerprint(spec, weights)}
    (tmp_path / "vocab.txt").write_text("[PAD]\n", encoding="utf-8")
    for name, value in (
        ("VOCAB_PATH", tmp_path / "vocab.txt"),
        ("TOKENIZER_VERSION", "other"),
        ("TRANSFORM_VERSION", "other"),
        ("IMAGE_MEAN", (0.5, 0.5, 0.5)),
        ("IMAGE_STD", (0.5, 0.5, 0.5)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"tuwen.fingerprint.{name}", value)
            seen.add(model_fingerprint(spec, weights))
    assert len(seen) == 6
