"""The arithmetic of docs/capacity.md against operations that are counted, and the page against the arithmetic."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from perf.capacity import Machine, capacity_table, dollars_per_million, image_flops, latency_table, text_flops
from tuwen.model import ChineseCLIP
from tuwen.specs import get_spec

DOCUMENT = Path(__file__).parents[2] / "docs" / "capacity.md"


def test_the_page_shows_what_the_arithmetic_gives() -> None:
    page = DOCUMENT.read_text(encoding="utf-8")
    assert capacity_table() in page
    assert latency_table() in page


@pytest.mark.parametrize("architecture", ["ViT-B-16", "ViT-L-14-336"])
def test_operations_are_those_that_pytorch_counts(architecture: str) -> None:
    """Ours counts every layer in full; the towers compute the last one for the first position alone."""
    spec = get_spec(architecture)
    assert isinstance(spec.vision.layers, int)
    with torch.device("meta"):
        model = ChineseCLIP(spec).eval()
        pixel_values = torch.empty(1, 3, spec.vision.resolution, spec.vision.resolution)
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model.encode_image(pixel_values)
    last_layer = image_flops(spec) / spec.vision.layers
    assert image_flops(spec) - last_layer < counted.get_total_flops() < 1.01 * image_flops(spec)


def test_a_text_costs_by_its_tokens() -> None:
    spec = get_spec("ViT-B-16")
    weights = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert text_flops(spec, 1) == pytest.approx(2 * weights, rel=0.001)
    assert text_flops(spec, 52) > 52 * text_flops(spec, 1)


def test_a_cost_is_the_price_over_what_is_answered() -> None:
    machine = Machine("m", 3.6, {"image": 10.0, "text": 100.0}, "made up")
    assert dollars_per_million(machine, "image") == pytest.approx(3.6 / (0.6 * 10 * 3600) * 1e6)
    assert dollars_per_million(machine, "image") == pytest.approx(10 * dollars_per_million(machine, "text"))
