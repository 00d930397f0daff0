"""Chinese-CLIP's own trainer on a CPU: its model, its LMDB data set and loader, its loop, as the package has them.

    python -m perf.published_trainer --data LMDB_SPLIT --architecture Tiny-RN --batch 128 --steps 12

Its main needs CUDA, so this stands in its place: `.cuda()` does nothing, and the parts of torchvision that its
transform uses are written here step by step. Prints seconds of each step as JSON. A process of its own, because it
patches torch.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from perf.published import build_cn_clip, import_cn_clip
from tuwen.model import ChineseCLIP
from tuwen.specs import get_spec

WEIGHT_DECAY = 0.2  # source: Chinese-CLIP's params.py, as all settings here


class _Compose:
    def __init__(self, transforms: list[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


class _Resize:
    def __init__(self, size: tuple[int, int], interpolation: int = 3) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.resize(self.size[::-1], Image.Resampling.BICUBIC)


class _ToTensor:
    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class _Normalize:
    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.clone().sub_(self.mean).div_(self.std)


def import_trainer() -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """cn_clip's training.data, training.train and training.scheduler."""
    import_cn_clip()
    interpolation = types.SimpleNamespace(BICUBIC=3)
    transforms = {
        "Compose": _Compose, "Resize": _Resize, "ToTensor": _ToTensor, "Normalize": _Normalize,
        "InterpolationMode": interpolation,
    }  # fmt: skip
    stubs: dict[str, dict[str, Any]] = {
        "torchvision": {"__path__": []},
        "torchvision.transforms": transforms,
        "timm": {"__path__": []},
        "timm.data": {"create_transform": None},  # augmentation, which is off
    }
    for name, attributes in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    from cn_clip.training import data, scheduler, train

    return data, train, scheduler


class _Parallel(nn.Module):
    """In place of DistributedDataParallel, which a single process does without."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW and its groups as main.py has them."""

    def is_kept(name: str) -> bool:
        return any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    named = list(model.named_parameters())
    groups = [
        {"params": [parameter for name, parameter in named if is_kept(name)], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in named if not is_kept(name)], "weight_decay": WEIGHT_DECAY},
    ]
    return torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)


def step_seconds(data_dir: Path, architecture: str, batch: int, steps: int) -> list[float]:
    """Train from random weights; the time of each step but the last."""
    data_module, train_module, scheduler_module = import_trainer()
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    spec = get_spec(architecture)
    torch.manual_seed(0)
    bare = build_cn_clip(spec)
    bare.load_state_dict(ChineseCLIP(spec).state_dict(), strict=False)
    data_module.fetch_resolution = lambda name: spec.vision.resolution  # type: ignore[attr-defined]
    settings = types.SimpleNamespace(
        train_data=str(data_dir), val_data=None, use_augment=False, vision_model=architecture, batch_size=batch,
        seed=0, num_workers=0, mask_ratio=0, distillation=False, accum_freq=1, aggregate=True, gather_with_grad=False,
        local_device_rank=0, report_training_batch_acc=False, freeze_vision=False, max_steps=steps, precision="fp32",
        rank=0, log_interval=10, world_size=1, should_save=False, save_step_frequency=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        model = _Parallel(bare)
        optimizer = optimizer_of(model)
        schedule = scheduler_module.cosine_lr(optimizer, 5e-4, 500, steps)
        began: list[float] = []

        def at_each_step(step: int) -> None:
            began.append(time.perf_counter())
            schedule(step)

        found = data_module.get_data(settings, epoch_id=0, max_txt_length=52)
        train_module.train(model, found, 0, optimizer, None, at_each_step, settings, 0)
        torch.distributed.destroy_process_group()
    return [after - before for before, after in pairwise(began)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="an LMDB split")
    parser.add_argument("--architecture", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    print(json.dumps(step_seconds(options.data, options.architecture, options.batch, options.steps)))


if __name__ == "__main__":
    main()
