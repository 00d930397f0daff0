"""The published figures as data: all there, and a few as they are printed."""

from __future__ import annotations

from itertools import product

import pytest

from eval.prompts import load_tasks
from eval.published import load_published, published_model, published_recall, published_zero_shot

MODELS = ("RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14")
DIRECTED = (("MUGE", "text_to_image"), *product(("Flickr30K-CN", "COCO-CN"), ("text_to_image", "image_to_text")))


def test_every_cell_of_every_table_is_there_once() -> None:
    published = load_published()
    retrieval = [(one.model, (one.data, one.direction), one.setup) for one in published.retrieval]
    assert sorted(retrieval) == sorted(product(MODELS, DIRECTED, ("zero_shot", "fine_tuned")))
    tasks = {one.task for one in published.zero_shot}
    assert len(tasks) == 11
    assert sorted((one.model, one.task) for one in published.zero_shot) == sorted(product(MODELS, tasks))
    runtimes = ("pytorch", "onnx", "tensorrt")
    speed = [(one.model, one.tower, one.engine) for one in published.speed]
    assert sorted(speed) == sorted(product(MODELS, ("image", "text"), runtimes))
    conversion = [(one.model, one.engine) for one in published.conversion]
    assert sorted(conversion) == sorted(product(("ViT-B-16", "ViT-H-14"), runtimes))
    assert "github.com/OFA-Sys/Chinese-CLIP" in published.source
    assert "2211.01335" in published.source


def test_figures_are_fractions_and_recall_grows_with_k() -> None:
    published = load_published()
    assert all(0 < one.r1 < one.r5 < one.r10 <= 1 for one in published.retrieval)
    assert all(0.05 < one.score < 1 for one in published.zero_shot)
    assert all(0.7 < one.mean_recall < 0.8 for one in published.conversion)
    assert all(0.5 < one.latency_ms < 50 for one in published.speed)


def test_a_few_as_printed() -> None:
    """Chinese-CLIP's Results.md and deployment.md."""
    muge = published_recall("ViT-B-16", "MUGE", "text_to_image")
    assert muge is not None
    assert (muge.r1, muge.r5, muge.r10) == (0.521, 0.767, 0.844)
    assert muge.mean_recall == pytest.approx(0.711, abs=5e-4)  # printed to one decimal of a per cent
    tuned = published_recall("ViT-L-14-336", "Flickr30K-CN", "image_to_text", "fine_tuned")
    assert tuned is not None
    assert (tuned.r1, tuned.r5, tuned.r10) == (0.966, 0.998, 1.0)
    assert published_zero_shot("RN50", "FGVC") == 0.054
    assert published_zero_shot("ViT-H-14", "ImageNet") == 0.596
    latencies = {(one.model, one.tower, one.engine): one.latency_ms for one in load_published().speed}
    assert latencies["ViT-L-14-336", "image", "onnx"] == 48.4
    assert {one.engine: one.mean_recall for one in load_published().conversion if one.model == "ViT-B-16"} == {
        "pytorch": 0.711, "onnx": 0.711, "tensorrt": 0.71,
    }  # fmt: skip


def test_a_model_is_known_by_either_name() -> None:
    """Of the architecture, or as served; others have no published figures."""
    assert published_model("vit_l_14_336") == published_model("ViT-L-14-336") == "ViT-L-14-336"
    assert published_zero_shot("vit_b_16", "CIFAR10") == 0.92
    for name in ("Tiny-RN", "vit_b_16_ours", "8-layers", ""):
        assert published_model(name) is None
        assert published_zero_shot(name, "CIFAR10") is None
    assert published_zero_shot("ViT-B-16", "Food") is None
    assert published_recall("ViT-B-16", "MUGE", "image_to_text") is None


def test_every_column_belongs_to_one_task() -> None:
    columns = [task.published for task in load_tasks().values() if task.published]
    assert sorted(columns) == sorted({one.task for one in load_published().zero_shot})
