"""On a machine with a GPU: plans built by TensorRT itself, run on it, measured by the gate. Elsewhere it is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from builders.cuda_device import compute_capability
from builders.gpu_build import _FIRST_CAPABILITY, build_gpu
from builders.plan_gate import MIN_COSINE, PlanPrecision
from builders.plan_runner import open_plan
from builders.tensorrt_plan import import_tensorrt
from builders.towers import TOWERS
from tuwen.errors import MissingDependency
from tuwen.tokenizer import pack_rows

pytestmark = pytest.mark.gpu

SAMPLE = Path(__file__).parents[2] / "samples" / "emoji_tiny"


@pytest.fixture(autouse=True)
def _gpu() -> None:
    try:
        compute_capability(), import_tensorrt()
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", get_args(PlanPrecision))
def test_the_samples_plans_pass_the_gate(tmp_path: Path, precision: PlanPrecision) -> None:
    if compute_capability() < _FIRST_CAPABILITY.get(precision, compute_capability()):
        pytest.skip(f"this GPU has no {precision}")
    result = build_gpu(SAMPLE, None, tmp_path / "served", precision=precision)
    for kind in TOWERS:
        assert result.parity(kind).min_cosine >= MIN_COSINE[precision]
        assert (result.cpu.place.tower_dir(kind) / result.plan_name).is_file()
    assert build_gpu(SAMPLE, None, tmp_path / "served", precision=precision, if_changed=True).is_current


def test_a_plan_answers_at_the_bounds_of_its_profile(tmp_path: Path) -> None:
    """One token, and 32 texts of 52: least and most that the server ever joins."""
    result = build_gpu(SAMPLE, None, tmp_path / "served")
    plan = result.cpu.place.tower_dir("text") / result.plan_name
    with open_plan(import_tensorrt(), plan) as run:
        for rows in ([[101]], [[101, *range(200, 250), 102]] * 32):
            assert run(dict(pack_rows(rows)))["text_embeds"].shape == (len(rows), 128)
