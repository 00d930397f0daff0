"""Tuwen: Chinese-CLIP, images and Chinese text in one embedding space.

    import tuwen
    model, preprocess = tuwen.load_from_name("ViT-B-16", device="cpu", download_root="./")
    image_features = model.encode_image(preprocess(picture)[None])
    text_features = model.encode_text(tuwen.tokenize(["一只猫", "一只狗"]))

torch is imported when one of these names is used, not before: a Triton model imports `tuwen.tokenizer` without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuwen.hub import available_models, load_from_name, tokenize

__all__ = ["available_models", "load_from_name", "tokenize"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tuwen' has no attribute {name!r}")
    from tuwen import hub

    return getattr(hub, name)
