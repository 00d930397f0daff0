"""Shared by all tests: the published implementation as a reference, and small random models."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tuwen.model import ChineseCLIP
from tuwen.specs import SPECS, ModelSpec, TextSpec, VisionSpec

SMALL_TEXT = TextSpec(layers=2, hidden_size=64, num_heads=4, intermediate_size=128, max_positions=64, dropout=0.1)
SMALL_SPECS = {
    "vit": ModelSpec("Small-ViT", 32, VisionSpec("vit", 32, 2, 64, 8, head_width=16), SMALL_TEXT),
    "resnet": ModelSpec("Small-RN", 32, VisionSpec("resnet", 64, (1, 1, 1, 1), 8, head_width=32), SMALL_TEXT),
}


def _stub(name: str, **attributes: object) -> None:
    module = types.ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module


class _Anything:
    """Stands in for names cn_clip imports from torchvision and never uses in what is compared."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    BICUBIC = 3


@pytest.fixture(scope="session")
def cn_clip() -> ModuleType:
    """The published package. torchvision does not import beside a CPU build of torch, so its names are stubbed."""
    names = ("Compose", "ToTensor", "Normalize", "Resize", "InterpolationMode")
    _stub("torchvision", __path__=[])
    _stub("torchvision.transforms", **dict.fromkeys(names, _Anything))
    _stub("timm", __path__=[])
    _stub("timm.data", create_transform=_Anything)
    try:
        return pytest.importorskip("cn_clip.clip", reason="pip install --no-deps cn-clip==1.6.0 six")
    finally:
        # transformers looks for torchvision too, and must not find the stub.
        for name in ("torchvision", "torchvision.transforms", "timm", "timm.data"):
            del sys.modules[name]


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
