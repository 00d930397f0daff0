"""How far float16 and bfloat16 towers are from PyTorch's float32, and how near to overflow; a Markdown table.

    python -m perf.half_numerics                                      # the published architectures and the sample
    python -m perf.half_numerics --only ViT-B-16 --weights outliers

Real captions and pictures of samples/, and random input; see docs/gpu_numerics.md for what is emulated.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from builders.feeds import Feed
from builders.half_numerics import MIN_HALF_COSINE, Activation, measure_activations, measure_half_parity
from builders.onnx_export import export_tower
from builders.parity import Parity, tower_batches
from builders.reduced_precision import HalfType, write_half
from builders.towers import TOWERS, TowerKind
from tuwen.checkpoint import load_checkpoint
from tuwen.model import ChineseCLIP
from tuwen.specs import get_spec

SAMPLE = Path(__file__).parents[1] / "samples" / "emoji_tiny"
ARCHITECTURES = ("RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14")
_FINGERPRINT = 1

# Trained transformers carry a few channels far larger than the rest through every layer. CLIP's ViT-L reaches some
# hundreds in its residual stream (arXiv 2402.17762, table 1 and its appendix), BERT's outliers sit in a few fixed
# channels of its LayerNorms (arXiv 2105.06990). Ours are at the upper end of that.
OUTLIER_CHANNELS = 2
OUTLIER_BIAS = 500.0
OUTLIER_GAIN = 10.0


@dataclass(frozen=True)
class Row:
    """One tower in one precision."""

    name: str
    weights: str
    kind: TowerKind
    dtype: HalfType
    parity: Parity
    largest: Activation

    def markdown(self) -> str:
        measured = f"{self.parity.min_cosine:.6f} | {self.parity.max_abs_diff:.1e} | {self.largest.largest:.4g}"
        return f"| {self.name}, {self.weights} | {self.kind} | {self.dtype} | {measured} | `{self.largest.node}` |"


def random_model(name: str) -> ChineseCLIP:
    """Weights as the towers are initialised, save what would hide half of a tower: a ResNet's blocks start as the
    identity, and biases at 0."""
    torch.manual_seed(0)
    model = ChineseCLIP(get_spec(name)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
                module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.BatchNorm2d) and module.bias is not None:
                module.bias.normal_(0, 0.02)
    return model


@torch.no_grad()
def add_outliers(model: ChineseCLIP) -> None:
    """Give a few channels of each residual stream the magnitude that they have in trained models."""
    for name, module in model.named_modules():
        channels = slice(7, 7 + OUTLIER_CHANNELS)
        if name.startswith("bert.encoder") and isinstance(module, nn.LayerNorm):
            module.weight[channels] *= OUTLIER_GAIN
        elif name == "visual.transformer.resblocks.1.mlp.c_proj":
            module.bias[channels] += OUTLIER_BIAS  # type: ignore[index]
        elif isinstance(module, nn.BatchNorm2d) and name.endswith("bn3"):
            module.weight[channels] *= OUTLIER_GAIN


def measure(name: str, weights: str, model: ChineseCLIP, items: int) -> Iterator[Row]:
    for kind in TOWERS:
        with tempfile.TemporaryDirectory() as folder:
            fp32 = Path(folder, "model.onnx")
            export_tower(model, kind, _FINGERPRINT, fp32)
            for dtype in get_args(HalfType):
                half = Path(folder, f"{dtype}.onnx")
                write_half(fp32, half, dtype)
                parity = measure_half_parity(model, kind, half, _FINGERPRINT, items)
                yield Row(name, weights, kind, dtype, parity, _largest(half, _one_feed(model, kind)))
                half.unlink()
                half.with_name(f"{half.name}.data").unlink(missing_ok=True)


def _one_feed(model: ChineseCLIP, kind: TowerKind) -> Feed:
    """The last batch: the captions together, or one picture."""
    *_, (feed, _) = tower_batches(model, kind, num_real=2)
    return feed


def _largest(path: Path, feed: Feed) -> Activation:
    """Of what is computed in the low precision."""
    return max((each for each in measure_activations(path, feed) if each.is_half), key=lambda each: each.largest)


def _sample() -> ChineseCLIP:
    return load_checkpoint(SAMPLE)


def _stressed(name: str) -> ChineseCLIP:
    model = random_model(name)
    add_outliers(model)
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("sample", *ARCHITECTURES), default=["sample", *ARCHITECTURES])
    parser.add_argument("--weights", choices=("random", "outliers"), default="random")
    parser.add_argument("--items", type=int, default=8, help="real captions and pictures each")
    arguments = parser.parse_args()
    make: Callable[[str], ChineseCLIP] = random_model if arguments.weights == "random" else _stressed
    print("| model, weights | tower | precision | min cosine | max abs diff | largest activation | of node |")
    print("|---|---|---|---|---|---|---|")
    missed = False
    for name in arguments.only:
        weights, model = ("trained", _sample()) if name == "sample" else (arguments.weights, make(name))
        for row in measure(name, weights, model, arguments.items):
            print(row.markdown(), flush=True)
            missed |= row.dtype == "fp16" and not row.parity.min_cosine >= MIN_HALF_COSINE
        del model
        gc.collect()
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
