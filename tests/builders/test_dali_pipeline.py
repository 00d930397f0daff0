"""model.dali: its twin on the CPU gives the transform's pixels, and what it needs is said in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from builders.dali_pipeline import write_pipeline
from perf.dali import Dali, damaged_outcomes, levels_off
from tests.test_image_guard import ODD, ORDINARY
from tests.test_image_transform import FILES, encode, photograph
from tuwen.errors import MissingDependency
from tuwen.image_guard import guard_image
from tuwen.image_transform import preprocess_image

R = 64
# DALI keeps a float32 between the two passes of its resize where Pillow rounds to uint8, and at an overshooting edge
# clamps; seen over photographs (`python -m perf.dali`): 10 levels of 255 at most, 0.3 on average.
MAX_LEVELS, MEAN_LEVELS = 12.0, 0.4


@pytest.fixture(scope="module")
def twin() -> Dali:
    pytest.importorskip("nvidia.dali")
    return Dali(R)


@pytest.mark.parametrize("name", ORDINARY)
def test_what_the_guard_lets_through_looks_as_pillow_sees_it(name: str, twin: Dali) -> None:
    levels = levels_off(twin([ORDINARY[name]])[0], preprocess_image(ORDINARY[name], R))
    assert levels.max() <= MAX_LEVELS
    assert levels.mean() <= MEAN_LEVELS


@pytest.mark.parametrize("name", [*FILES, *ODD])
def test_what_the_guard_decodes_is_the_transforms_own(name: str, twin: Dali) -> None:
    encoded = (FILES | ODD)[name]
    guarded = guard_image(encoded, R)
    if guarded != encoded:
        # Not to the last bit: DALI multiplies by 1 / std where we divide.
        assert np.allclose(twin([guarded])[0], preprocess_image(encoded, R), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (7, 5), (64, 64), (65, 63), (1201, 801)])
def test_sizes_of_all_kinds(size: tuple[int, int], twin: Dali) -> None:
    encoded = encode(photograph(*size), "JPEG", quality=95)
    levels = levels_off(twin([encoded])[0], preprocess_image(encoded, R))
    assert levels.max() <= MAX_LEVELS
    assert levels.mean() <= MEAN_LEVELS


def test_a_batch_is_its_items_and_padding_is_ignored(twin: Dali) -> None:
    """Files of one request are padded to one length by the guard."""
    files = [guard_image(encoded, R) for encoded in (*ORDINARY.values(), *FILES.values())]
    alone = np.concatenate([twin([file]) for file in files])
    assert np.array_equal(twin([file + bytes(100) for file in files]), alone)


def test_no_damaged_file_that_passes_the_guard_is_refused_by_dali(twin: Dali) -> None:
    outcomes = damaged_outcomes(twin, R, 400)
    assert outcomes["passed"] > 50
    assert outcomes["refused"] > 100
    assert not outcomes["refused by DALI"]
    assert not outcomes["other than the transform"]


def test_the_gpus_pipeline_is_written_without_one(tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    write_pipeline(R, tmp_path / "model.dali", "gpu")
    assert [path.name for path in tmp_path.iterdir()] == ["model.dali"]
    assert b"mixed" in (tmp_path / "model.dali").read_bytes()
    if not torch.cuda.is_available():  # it is a pipeline, and wants the one thing that is missing
        with pytest.raises(RuntimeError, match="GPU"):
            dali.Pipeline.deserialize(filename=str(tmp_path / "model.dali"), device_id=None)


def test_without_dali_a_sentence_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(MissingDependency, match=r"pip install 'tuwen\[gpu\]'"):
        write_pipeline(R, tmp_path / "model.dali", "gpu")
    assert not list(tmp_path.iterdir())
