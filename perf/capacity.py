"""Requests per second and cost of a machine, by arithmetic from figures that are measured or cited: the tables of
docs/capacity.md.

python -m perf.capacity
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tuwen.specs import ModelSpec, get_spec

ARCHITECTURE = "ViT-B-16"
USUAL_TOKENS = 9  # a query of 7 characters, MUGE's mean, with [CLS] and [SEP]
# What is planned for: the rest absorbs bursts and the loss of a machine. By queueing theory a request waits, on the
# average, as long as it is served at half load, and four times as long at 80 %.
PLANNED_LOAD = 0.6
# Of the peak that a large batch reaches. Assumed, not measured: Chinese-CLIP's T4 at batch 1 comes to 0.15 for images.
ASSUMED_EFFICIENCY = 0.4
SECONDS_PER_HOUR = 3600

Side = Literal["image", "text"]


@dataclass(frozen=True)
class Machine:
    """One rented machine; `price_per_hour` in US dollars, on demand, Linux, us-east-1."""

    name: str
    price_per_hour: float
    items_per_second: dict[Side, float]
    source: str


@dataclass(frozen=True)
class Gpu:
    name: str
    instance: str
    price_per_hour: float
    fp16_tflops: float  # dense, tensor cores, of its data sheet


# Price lists as of mid 2026; look them up before you rely on them.
GPUS = (
    Gpu("T4", "g4dn.xlarge", 0.526, 65),
    Gpu("A10G", "g5.xlarge", 1.006, 70),
    Gpu("L4", "g6.xlarge", 0.805, 121),
)
# docs/performance.md, `python -m perf.serving`, two cores; a c7i.xlarge has two cores, four hardware threads.
CPU_FP32 = Machine("2 cores, float32", 0.1785, {"image": 4.23, "text": 80.8}, "measured")
CPU_INT8 = Machine("2 cores, int8", 0.1785, {"image": 11.6, "text": 198}, "measured")
# github.com/OFA-Sys/Chinese-CLIP, deployment_En.md: TensorRT fp16, batch 1, milliseconds an item.
T4_BATCH_1 = Machine("T4, one at a time", 0.526, {"image": 1000 / 3.58, "text": 1000 / 1.54}, "cited")


def image_flops(spec: ModelSpec) -> float:
    """Of one picture through a ViT: 2 for each weight and token, and attention's two products."""
    vision = spec.vision
    assert isinstance(vision.layers, int)
    assert vision.patch_size is not None
    tokens = vision.grid_size**2 + 1
    per_layer = 2 * 12 * vision.width**2 * tokens + 4 * tokens**2 * vision.width
    return vision.layers * per_layer + 2 * 3 * vision.patch_size**2 * vision.width * (tokens - 1)


def text_flops(spec: ModelSpec, tokens: int) -> float:
    """Of one text; packed, so that padding costs nothing."""
    text = spec.text
    per_token = 2 * (4 * text.hidden_size**2 + 2 * text.hidden_size * text.intermediate_size)
    return text.layers * (per_token * tokens + 4 * tokens**2 * text.hidden_size)


def expected(gpu: Gpu, spec: ModelSpec) -> Machine:
    """Large batches, by the peak of the data sheet."""
    usable = gpu.fp16_tflops * 1e12 * ASSUMED_EFFICIENCY
    rates: dict[Side, float] = {
        "image": usable / image_flops(spec),
        "text": usable / text_flops(spec, USUAL_TOKENS),
    }
    return Machine(f"{gpu.name} ({gpu.instance}), batches", gpu.price_per_hour, rates, "expected")


def dollars_per_million(machine: Machine, side: Side) -> float:
    """At the planned load."""
    per_hour = machine.items_per_second[side] * PLANNED_LOAD * SECONDS_PER_HOUR
    return machine.price_per_hour / per_hour * 1e6


def table(machines: list[Machine]) -> str:
    """Markdown, a row for each machine."""
    rows = [
        "| machine | $/h | pictures/s | texts/s | $ per million pictures | $ per million texts | figures |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in machines:
        rates = (f"{each.items_per_second[side]:,.3g}" for side in ("image", "text"))
        costs = (f"{dollars_per_million(each, side):,.3g}" for side in ("image", "text"))
        rows.append(f"| {each.name} | {each.price_per_hour} | {' | '.join((*rates, *costs))} | {each.source} |")
    return "\n".join(rows)


def capacity_table() -> str:
    """The table of docs/capacity.md."""
    spec = get_spec(ARCHITECTURE)
    return table([CPU_FP32, CPU_INT8, T4_BATCH_1, *(expected(gpu, spec) for gpu in GPUS)])


if __name__ == "__main__":
    print(capacity_table())
