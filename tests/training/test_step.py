"""Exact gradients of a global batch, however it is cut: in chunks, over processes, in copies or shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.one_step import Outcome, global_batch, recipe_of, small_model, take
from training.distributed import World
from training.feature_loss import FeatureLoss
from training.order import torch_seed
from training.towers import Towers, chunks_of, normalize

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parents[2]
# Of the largest gradient; the bound. float32 sums in another order differ by some 1e-6.
MAX_DIFFERENCE = 1e-5


@pytest.fixture(scope="module")
def whole() -> Outcome:
    """One process, one chunk: an ordinary backward pass."""
    return take(recipe_of([]), ALONE, small_model())


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert found.accuracy == pytest.approx(expected.accuracy, abs=1e-6)
    assert found.gradients.keys() == expected.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        assert float((found.gradients[name] - gradient).abs().max()) <= MAX_DIFFERENCE * largest, name


def test_the_ordinary_pass_is_autograds(whole: Outcome) -> None:
    """The reference itself, against a loss that autograd goes through from end to end."""
    model, batch = small_model(), global_batch(ALONE)
    (chunk,) = chunks_of(batch, 0)
    embeds = Towers(model)(chunk.pixels, chunk.input_ids, chunk.offsets, chunk.longest)
    losses, share = FeatureLoss(recipe_of([]), ALONE, model)(*embeds, batch)
    share.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert losses.total == pytest.approx(whole.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(whole.gradients[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [["optim.chunk_size=3"], ["optim.chunk_size=1", "engine.grad_checkpointing=true"]])
def test_chunks_change_no_gradient(settings: list[str], whole: Outcome) -> None:
    assert_equal(take(recipe_of(settings), ALONE, small_model()), whole)


def test_both_passes_draw_the_same_dropout_and_the_same_masks() -> None:
    """Against one pass of the same chunks, with their graphs, from the same seeds."""
    recipe = recipe_of(["optim.chunk_size=3", "model.mask_ratio=0.5"])
    found = take(recipe, ALONE, small_model(dropout=0.5))
    model, batch = small_model(dropout=0.5), global_batch(ALONE)
    towers, seed = Towers(model, 0.5), torch_seed(recipe.run.seed, "step", 0, 0, 0)
    parts = []
    for number, chunk in enumerate(chunks_of(batch, 3)):
        torch.manual_seed(torch_seed(seed, number))
        parts.append(towers(chunk.pixels, chunk.input_ids, chunk.offsets, chunk.longest))
    losses, share = FeatureLoss(recipe, ALONE, model)(*map(torch.cat, zip(*parts, strict=True)), batch)
    share.backward()
    assert losses.total == pytest.approx(found.loss)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found.gradients[name], parameter.grad, atol=2e-5, rtol=1e-3)


def test_masks_look_at_some_patches_alone() -> None:
    towers = Towers(small_model(), mask_ratio=0.75)
    kept = towers._patches_kept(200, ALONE.device)
    assert kept.shape == (200, 4)  # of 16
    assert all(len(set(row)) == 4 for row in kept.tolist())
    assert torch.bincount(kept.flatten(), minlength=16).min() > 20  # 50 on average


def test_a_pass_that_is_repeated_counts_once_in_batch_norms() -> None:
    """Running statistics after a step of four chunks are those of four batches, not of eight."""
    model = small_model(kind="resnet")
    norm, batch = model.visual.bn1, global_batch(ALONE, resolution=64)
    outputs = []
    expected = norm.running_mean.clone()
    for chunk in chunks_of(batch, 2):
        mean = model.visual.conv1(normalize(chunk.pixels)).mean(dim=(0, 2, 3)).detach()
        expected = 0.9 * expected + 0.1 * mean
        outputs.append(mean)
    take(recipe_of(["optim.chunk_size=2"]), ALONE, model, resolution=64)
    torch.testing.assert_close(norm.running_mean, expected)


def test_a_frozen_tower_stays_and_the_other_learns() -> None:
    model = small_model()
    model.visual.requires_grad_(False)
    found = take(recipe_of(["optim.chunk_size=3"]), ALONE, model)
    moved = {name.split(".")[0] for name, gradient in found.gradients.items() if gradient.abs().max() > 0}
    assert moved == {"bert", "text_projection", "logit_scale"}


def distributed(processes: int, out: Path, *settings: str) -> Outcome:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    ran = subprocess.run(
        [*command, "-m", "tests.training.one_step", str(out), *settings],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return Outcome(**torch.load(out, weights_only=True))


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, ["optim.chunk_size=2"]),
        (2, ["loss.local_loss=false", "loss.gather_with_grad=false"]),
        (4, ["loss.local_loss=false", "optim.chunk_size=1"]),
        (2, ["engine.strategy=fsdp", "optim.chunk_size=2", "engine.grad_checkpointing=true"]),
    ],
    ids=["ddp", "whole matrix, no gradient through the gather", "four processes, whole matrix", "fsdp"],
)
def test_processes_change_no_gradient(processes: int, settings: list[str], whole: Outcome, tmp_path: Path) -> None:
    assert_equal(distributed(processes, tmp_path / "out.pt", *settings), whole)


def test_the_sigmoid_loss_over_processes(tmp_path: Path) -> None:
    alone = take(recipe_of(["loss.kind=sigmoid"]), ALONE, small_model())
    assert_equal(distributed(2, tmp_path / "out.pt", "loss.kind=sigmoid"), alone)


def test_without_aggregation_each_process_has_its_own_negatives(whole: Outcome, tmp_path: Path) -> None:
    found = distributed(2, tmp_path / "out.pt", "loss.aggregate=false")
    assert found.loss < whole.loss  # half as many negatives
    assert found.grad_norm > 0
