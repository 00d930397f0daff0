"""The towers compute what the published implementations compute, with the same random weights."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from perf.published import build_cn_clip
from tests.conftest import random_model, two_layers
from tuwen.checkpoint import from_hugging_face, load_checkpoint, load_weights
from tuwen.model import ChineseCLIP
from tuwen.specs import SPECS, ModelSpec

# The bound the project asks for in fp32; sums of a few hundred products differ in their last bits by order alone.
MAX_ABS_DIFF = 2e-5
PUBLISHED = ("RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14")
FULL_SIZE = [pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED]


def inputs(spec: ModelSpec, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(103, spec.text.vocab_size, (batch, spec.context_length))
    input_ids[0, 7:] = 0  # padding is part of what is compared
    return torch.randn(batch, 3, spec.vision.resolution, spec.vision.resolution), input_ids


def build_hugging_face(spec: ModelSpec) -> torch.nn.Module:
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    vision, text = spec.vision, spec.text
    config = ChineseCLIPConfig(
        projection_dim=spec.embed_dim,
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.num_heads,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_positions,
        },
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.width * 4,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.resolution,
            "patch_size": vision.patch_size,
        },
    )
    return ChineseCLIPModel(config).eval()


@torch.inference_mode()
def check_against_cn_clip(cn_clip: ModuleType, spec: ModelSpec) -> None:
    ours = random_model(spec)
    theirs = build_cn_clip(spec)
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("pooler" in key for key in result.missing_keys)
    pixel_values, input_ids = inputs(spec)
    for name, (mine, published) in {
        "image_embeds": (ours.encode_image(pixel_values, True), unit(theirs.encode_image(pixel_values))),
        "text_embeds": (ours.encode_text(input_ids, True), unit(theirs.encode_text(input_ids))),
        "logits": (ours.get_similarity(pixel_values, input_ids)[0], theirs.get_similarity(pixel_values, input_ids)[0]),
    }.items():
        difference = (mine - published).abs().max().item()
        assert difference <= MAX_ABS_DIFF, f"{spec.name} {name}: {difference}"
        assert mine.abs().max() > 1e-3


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_layers_of_each_architecture_equal_cn_clip(cn_clip: ModuleType, name: str) -> None:
    check_against_cn_clip(cn_clip, two_layers(name))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_each_architecture_equals_cn_clip(cn_clip: ModuleType, name: str) -> None:
    check_against_cn_clip(cn_clip, SPECS[name])


@torch.inference_mode()
def check_against_hugging_face(spec: ModelSpec) -> None:
    theirs = build_hugging_face(spec)
    ours = ChineseCLIP(spec).eval()
    load_weights(ours, from_hugging_face(theirs.state_dict()), source=__file__)
    pixel_values, input_ids = inputs(spec)
    published = theirs(
        input_ids=input_ids, pixel_values=pixel_values, attention_mask=(input_ids != 0).long(), return_dict=True
    )
    image_embeds, text_embeds, _ = ours(pixel_values, input_ids)
    logits, _ = ours.get_similarity(pixel_values, input_ids)
    for mine, theirs_ in (
        (image_embeds, published.image_embeds),
        (text_embeds, published.text_embeds),
        (logits, published.logits_per_image),
    ):
        assert (mine - theirs_).abs().max().item() <= MAX_ABS_DIFF


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-H-14"])
def test_two_layers_equal_transformers(name: str) -> None:
    check_against_hugging_face(two_layers(name))


# transformers has no ResNet Chinese-CLIP.
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name != "RN50"])
def test_each_vit_equals_transformers(name: str) -> None:
    check_against_hugging_face(SPECS[name])


def test_a_hugging_face_folder_is_read_whole(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = two_layers("ViT-B-16")
    monkeypatch.setitem(SPECS, "ViT-B-16", spec)
    theirs = build_hugging_face(spec)
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    assert ours.spec == spec
    pixel_values, _ = inputs(spec)
    features = theirs.get_image_features(pixel_values)
    features = getattr(features, "pooler_output", features)  # transformers 5 wraps it
    assert torch.allclose(unit(features), ours.encode_image(pixel_values, True), atol=MAX_ABS_DIFF)
