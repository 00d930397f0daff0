"""The published implementation, cn_clip, against which we measure: the same weights, the steps its README gives."""

from __future__ import annotations

import io
import sys
import types
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from tuwen.errors import MissingDependency
from tuwen.model import ChineseCLIP
from tuwen.specs import IMAGE_MEAN, IMAGE_STD, ModelSpec


class _Anything:
    """Stands in for names that cn_clip imports from torchvision and timm and never uses in what is compared."""

    BICUBIC = 3

    def __init__(self, *args: object, **kwargs: object) -> None: ...


def import_cn_clip() -> ModuleType:
    """cn_clip.clip; torchvision does not import beside a CPU build of torch, so its names are stubbed meanwhile.

    Raises:
        MissingDependency: it is not installed.
    """
    transforms = ("Compose", "ToTensor", "Normalize", "Resize", "InterpolationMode")
    stubs: dict[str, dict[str, Any]] = {
        "torchvision": {"__path__": []},
        "torchvision.transforms": dict.fromkeys(transforms, _Anything),
        "timm": {"__path__": []},
        "timm.data": {"create_transform": _Anything},
    }
    for name, attributes in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    try:
        import cn_clip.clip
    except ImportError as error:
        raise MissingDependency("the published implementation: pip install --no-deps cn-clip==1.6.0 six") from error
    finally:
        for name in stubs:  # transformers looks for torchvision too, and must not find a stub
            del sys.modules[name]
    module: ModuleType = cn_clip.clip
    return module


def build_cn_clip(spec: ModelSpec) -> torch.nn.Module:
    """cn_clip's model of this architecture, random weights, in eval mode; call `import_cn_clip` first."""
    from cn_clip.clip.model import CLIP

    vision, text = spec.vision, spec.text
    model: torch.nn.Module = CLIP(
        embed_dim=spec.embed_dim,
        image_resolution=vision.resolution,
        vision_layers=vision.layers,
        vision_width=vision.width,
        vision_patch_size=vision.patch_size,
        vocab_size=text.vocab_size,
        text_attention_probs_dropout_prob=text.dropout,
        text_hidden_act="gelu",
        text_hidden_dropout_prob=text.dropout,
        text_hidden_size=text.hidden_size,
        text_initializer_range=0.02,
        text_intermediate_size=text.intermediate_size,
        text_max_position_embeddings=text.max_positions,
        text_num_attention_heads=text.num_heads,
        text_num_hidden_layers=text.layers,
        text_type_vocab_size=text.type_vocab_size,
        vision_head_width=vision.head_width,
    ).eval()
    return model


def published_twin(model: ChineseCLIP) -> torch.nn.Module:
    """cn_clip's model with our weights."""
    import_cn_clip()
    twin = build_cn_clip(model.spec)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin


def published_transform(encoded: bytes, resolution: int) -> torch.Tensor:
    """cn_clip's image_transform, step by step as torchvision does it."""
    image = Image.open(io.BytesIO(encoded)).resize((resolution, resolution), Image.Resampling.BICUBIC).convert("RGB")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return tensor.sub(torch.tensor(IMAGE_MEAN)[:, None, None]).div(torch.tensor(IMAGE_STD)[:, None, None])
