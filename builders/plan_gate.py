"""The gate before a plan is placed: does it compute what ONNX Runtime and PyTorch compute, on the same real input?

What is measured is anything that runs a feed: a plan on the GPU (builders/plan_runner.py), or the reduced ONNX on the
CPU, which shows the arithmetic of a precision where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from builders.configs import MAX_BATCH_SIZE
from builders.feeds import Feed
from builders.half_numerics import MIN_HALF_COSINE
from builders.parity import Batch, open_session, tower_batches
from builders.tensorrt_plan import PlanFailed
from builders.towers import TowerKind
from tuwen.model import ChineseCLIP
from tuwen.tokenizer import pack_rows

PlanPrecision = Literal["fp16", "bf16", "fp32", "int8", "fp8"]
Run = Callable[[Feed], Feed]
FindOverflow = Callable[[Feed], str | None]

# Of the worst item with PyTorch's float32. fp32: as for the ONNX, sums in another order. fp16: what the field's broken
# exports miss by far (0.68 to 0.91), and a thousand times the loss that the sample's towers have. bf16 rounds 8 times
# more coarsely, which is 64 times in 1 - cosine: 1e-4 on the sample's pictures, 20 times of which are let pass. int8
# and fp8 round to some 1 in 100; what that costs is for the recall to say, see builders/quantize.py, so the bound only
# catches what is broken.
MIN_COSINE: dict[PlanPrecision, float] = {
    "fp32": 0.9999, "fp16": MIN_HALF_COSINE, "bf16": 0.998, "int8": 0.99, "fp8": 0.99,
}  # fmt: skip
# Lengths of embeddings are 1; the final normalisation is float32 in every precision.
MAX_NORM_ERROR = 1e-3
MAX_SCALE_ERROR = 1e-5  # logit_scale is float32 in every precision


@dataclass(frozen=True)
class PlanParity:
    """Of the worst item: cosine with PyTorch, with ONNX Runtime, and the largest difference of a component."""

    min_cosine: float
    min_cosine_onnx: float
    max_abs_diff: float
    num_items: int


@torch.inference_mode()
def gate_batches(model: ChineseCLIP, kind: TowerKind) -> list[Batch]:
    """What the ONNX was measured with, one by one and in few, and all of it together as a full batch."""
    batches = list(tower_batches(model, kind))
    return [*batches, _full_batch(kind, batches)]


def measure_plan(
    run: Run,
    onnx_path: Path,
    kind: TowerKind,
    precision: PlanPrecision,
    batches: Iterable[Batch],
    find_overflow: FindOverflow = lambda feed: None,
) -> PlanParity:
    """Compare `run` with PyTorch's embeddings in `batches` and with the float32 ONNX.

    Args:
        find_overflow: the layer of the reduced graph that first leaves the range of its type on a feed.
    Raises:
        PlanFailed: an output is not finite, of another shape or another model, or the cosine is below the bound.
    """
    session = open_session(onnx_path)
    names = [tensor.name for tensor in session.get_outputs()]
    found: list[tuple[npt.NDArray[np.float32], ...]] = []
    for feed, expected in batches:
        outputs, reference = run(feed), dict(zip(names, session.run(names, feed), strict=True))
        _check_outputs(outputs, reference, f"{kind} tower in {precision}", partial(find_overflow, feed))
        found.append((outputs[names[0]], expected, reference[names[0]]))
    embeds, expected, reference_embeds = (np.concatenate(column) for column in zip(*found, strict=True))
    parity = PlanParity(
        min_cosine=float((embeds * expected).sum(axis=1).min()),
        min_cosine_onnx=float((embeds * reference_embeds).sum(axis=1).min()),
        max_abs_diff=float(np.abs(embeds - expected).max()),
        num_items=len(embeds),
    )
    if (worst := min(parity.min_cosine, parity.min_cosine_onnx)) < MIN_COSINE[precision]:
        raise PlanFailed(
            f"{kind} tower in {precision}: cosine {worst:.6f} with {_farther(parity)}; expected at least "
            f"{MIN_COSINE[precision]}, so nothing was placed"
        )
    return parity


def _farther(parity: PlanParity) -> str:
    return "PyTorch" if parity.min_cosine <= parity.min_cosine_onnx else "ONNX Runtime"


def _check_outputs(outputs: Feed, reference: Feed, what: str, find_overflow: Callable[[], str | None]) -> None:
    """Shapes, finiteness, unit length; the fingerprint and the scale to the last bit that matters."""
    embeds_name, *others = reference
    embeds = outputs[embeds_name]
    if embeds.shape != reference[embeds_name].shape:
        raise PlanFailed(f"{what}: {embeds_name} {embeds.shape}, expected {reference[embeds_name].shape}")
    if not np.isfinite(embeds).all():
        layer = find_overflow()
        where = f"; {layer} overflows" if layer else "; on the CPU its graph stays finite, so it is TensorRT's kernels"
        raise PlanFailed(f"{what}: embeddings are not finite{where}, so nothing was placed")
    if (error := float(np.abs(np.linalg.norm(embeds, axis=1) - 1).max())) > MAX_NORM_ERROR:
        raise PlanFailed(f"{what}: embeddings are {error:.1e} off unit length, so nothing was placed")
    for name in others:
        found, expected = outputs[name], reference[name]
        if found.shape != expected.shape:
            raise PlanFailed(f"{what}: {name} {found.shape}, expected {expected.shape}")
        # Not "above the bound", which a NaN is not.
        if not np.abs(found - expected).max() <= (MAX_SCALE_ERROR if name == "logit_scale" else 0):
            raise PlanFailed(f"{what}: {name} {found.ravel()[0]}, expected {expected.ravel()[0]}")


def _full_batch(kind: TowerKind, batches: list[Batch]) -> Batch:
    """MAX_BATCH_SIZE items, those of the batches in turn."""
    expected = np.concatenate([embeds for _, embeds in batches])
    index = list(islice(cycle(range(len(expected))), MAX_BATCH_SIZE))
    if kind == "image":
        pixel_values = np.concatenate([feed["pixel_values"] for feed, _ in batches])
        return {"pixel_values": pixel_values[index]}, expected[index]
    rows = [row for feed, _ in batches for row in _rows(feed)]
    return dict(pack_rows([rows[one] for one in index])), expected[index]


def _rows(feed: Feed) -> list[list[int]]:
    """The texts that lie end to end in a feed."""
    return [feed["input_ids"][start:end].tolist() for start, end in pairwise(feed["text_offsets"])]
