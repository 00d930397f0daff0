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

# What gRPC, tokeniser and Python's part of Triton get through on two cores, the client beside them: the sample's tiny
# tower, docs/serving.md, `python -m perf.client_window`. An .xlarge has two cores, so a GPU's texts end here.
FRONT_TEXTS_PER_SECOND = 1620
# What the guard in front of DALI gets through on two cores: 1.4 ms a JPEG of 640 x 480; docs/dali.md.
FRONT_PICTURES_PER_SECOND = 2 * 1000 / 1.4

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
    """Of its data sheet: dense fp16 of the tensor cores, and memory. `instance` rents one, where a price is known."""

    name: str
    fp16_tflops: float
    memory_gb_per_s: float
    instance: str | None = None
    price_per_hour: float | None = None


# Price lists as of mid 2026; look them up before you rely on them.
GPUS = (
    Gpu("T4", 65, 320, "g4dn.xlarge", 0.526),
    Gpu("A10G", 70, 600, "g5.xlarge", 1.006),
    Gpu("L4", 121, 300, "g6.xlarge", 0.805),
    Gpu("A100 40 GB", 312, 1555),
    Gpu("H100 SXM", 989, 3350),
)
# Of the peak, for one picture at a time: Chinese-CLIP's 3.58 ms on a T4 are 0.15, and half as much time is hoped for.
BATCH_1_EFFICIENCY = (0.15, 0.3)
# Launching what a tower consists of, as a CUDA graph, and copying in and out. Assumed.
OVERHEAD_MS = 0.2
# docs/performance.md, `python -m perf.serving`, two cores; a c7i.xlarge has two cores, four hardware threads.
CPU_FP32 = Machine("2 cores, float32", 0.1785, {"image": 10.8, "text": 155}, "measured")
CPU_INT8 = Machine("2 cores, int8", 0.1785, {"image": 25.3, "text": 326}, "measured")
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
    assert gpu.price_per_hour is not None
    usable = gpu.fp16_tflops * 1e12 * ASSUMED_EFFICIENCY
    rates: dict[Side, float] = {
        "image": min(usable / image_flops(spec), FRONT_PICTURES_PER_SECOND),
        "text": min(usable / text_flops(spec, USUAL_TOKENS), FRONT_TEXTS_PER_SECOND),
    }
    return Machine(f"{gpu.name} ({gpu.instance}), batches", gpu.price_per_hour, rates, "expected")


def weights_gb(spec: ModelSpec, side: Side) -> float:
    """Of one tower in fp16, as far as every item reads them: not the table of word embeddings."""
    if side == "text":
        per_layer = 4 * spec.text.hidden_size**2 + 2 * spec.text.hidden_size * spec.text.intermediate_size
        return 2 * spec.text.layers * per_layer / 1e9
    assert isinstance(spec.vision.layers, int)
    return 2 * spec.vision.layers * 12 * spec.vision.width**2 / 1e9


def latency_ms(gpu: Gpu, spec: ModelSpec, side: Side) -> tuple[float, float]:
    """Least and most for one item alone: the longer of computing and of reading the weights, and the overhead."""
    flops = image_flops(spec) if side == "image" else text_flops(spec, USUAL_TOKENS)
    reading = weights_gb(spec, side) / gpu.memory_gb_per_s
    most, least = (
        1000 * max(flops / (gpu.fp16_tflops * 1e12 * efficiency), reading) + OVERHEAD_MS
        for efficiency in BATCH_1_EFFICIENCY
    )
    return least, most


def latency_table() -> str:
    """Markdown: milliseconds of one item, expected."""
    spec = get_spec(ARCHITECTURE)
    rows = ["| GPU | one picture, ms | one query, ms |", "|---|---|---|"]
    for gpu in GPUS:
        spans = (latency_ms(gpu, spec, side) for side in ("image", "text"))
        cells = (f"{least:.1f}" if most - least < 0.05 else f"{least:.1f} to {most:.1f}" for least, most in spans)
        rows.append(f"| {gpu.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


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
        rates = (_rounded(each.items_per_second[side]) for side in ("image", "text"))
        costs = (_rounded(dollars_per_million(each, side)) for side in ("image", "text"))
        rows.append(f"| {each.name} | {each.price_per_hour} | {' | '.join((*rates, *costs))} | {each.source} |")
    return "\n".join(rows)


def _rounded(number: float) -> str:
    """To two digits: none of this is more exact."""
    return f"{float(f'{number:.2g}'):,g}"


def capacity_table() -> str:
    """The table of docs/capacity.md."""
    spec = get_spec(ARCHITECTURE)
    return table([CPU_FP32, CPU_INT8, T4_BATCH_1, *(expected(gpu, spec) for gpu in GPUS if gpu.instance)])


if __name__ == "__main__":
    print(capacity_table(), latency_table(), sep="\n\n")
