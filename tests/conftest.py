"""Shared by all tests: the published implementation as a reference, and small random models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from perf.published import import_cn_clip
from tuwen.errors import MissingDependency
from tuwen.model import ChineseCLIP
from tuwen.specs import SPECS, ModelSpec, TextSpec, VisionSpec

SMALL_TEXT = TextSpec(layers=2, hidden_size=64, num_heads=4, intermediate_size=128, max_positions=64, dropout=0.1)
SMALL_SPECS = {
    "vit": ModelSpec("Small-ViT", 32, VisionSpec("vit", 32, 2, 64, 8, head_width=16), SMALL_TEXT),
    "resnet": ModelSpec("Small-RN", 32, VisionSpec("resnet", 64, (1, 1, 1, 1), 8, head_width=32), SMALL_TEXT),
}


@pytest.fixture(scope="session")
def cn_clip() -> ModuleType:
    """The published package."""
    try:
        return import_cn_clip()
    except MissingDependency as error:
        pytest.skip(str(error))


def randomise(model: torch.nn.Module) -> None:
    """Every weight and buffer random, of a size that keeps activations sane: no zero or one hides a wrong wiring."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or name == "logit_scale":
            continue
        if name.endswith(("running_var", "LayerNorm.weight", "bn1.weight", "bn2.weight", "bn3.weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        else:
            value.normal_(0, 0.1, generator=generator)


def random_model(spec: ModelSpec) -> ChineseCLIP:
    model = ChineseCLIP(spec).eval()
    randomise(model)
    return model


def two_layers(name: str) -> ModelSpec:
    """A published architecture cut to two layers a tower (four stages of one block), everything else as published."""
    spec = SPECS[name]
    layers: int | tuple[int, int, int, int] = 2 if spec.vision.kind == "vit" else (1, 1, 1, 1)
    return replace(spec, vision=replace(spec.vision, layers=layers), text=replace(spec.text, layers=2))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are faster on one thread; ten times faster beside another busy process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sorted(SMALL_SPECS))
def small_model(request: pytest.FixtureRequest) -> ChineseCLIP:
    return random_model(SMALL_SPECS[request.param])
