"""What a text costs by its length: packed, as it is served, and padded to 52 tokens, as the published code has it.

    python -m perf.lengths --plot docs/text_length_curve.png

ViT-B-16, float32 and int8, ONNX Runtime in this process, batches of 16 texts of one length; all in turn, medians.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from perf.rounds import alternate, machine, medians, milliseconds_of, write_json
from perf.serving import BENCH_DIR, FP32, INT8, bench_repository
from tuwen.specs import CLS_ID, CONTEXT_LENGTH, SEP_ID
from tuwen.tokenizer import pack_rows

LENGTHS = (4, 6, 8, 10, 12, 16, 20, 28, 36, 44, CONTEXT_LENGTH)
BATCH_SIZE = 16
ROUNDS = 5


def measure(repository: Path) -> dict[str, dict[int, float]]:
    """Precision -> length in tokens -> milliseconds a text."""
    random = np.random.default_rng(0)
    found: dict[str, dict[int, float]] = {}
    for name, precision in ((FP32, "fp32"), (INT8, "int8")):
        path = repository / f"{name}_text_tower" / "1" / "model.onnx"
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        sides = {}
        for length in LENGTHS:
            rows = [[CLS_ID, *random.integers(1000, 20000, length - 2), SEP_ID] for _ in range(BATCH_SIZE)]
            sides[str(length)] = milliseconds_of(partial(session.run, ["text_embeds"], pack_rows(rows)))
        alternate(sides, 1)
        times = medians(alternate(sides, ROUNDS))
        found[precision] = {length: times[str(length)] / BATCH_SIZE for length in LENGTHS}
    return found


def plot(found: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for precision, times in found.items():
        (line,) = axes.plot(list(times), list(times.values()), marker="o", label=f"{precision}, packed as served")
        axes.axhline(times[CONTEXT_LENGTH], color=line.get_color(), linestyle=":", label=f"{precision}, padded to 52")
    axes.set(
        xlabel="tokens of a text, [CLS] and [SEP] among them",
        ylabel="milliseconds a text",
        title=f"ViT-B-16 text tower, batches of {BATCH_SIZE}, two cores",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, default=BENCH_DIR / "lengths.json")
    options = parser.parse_args()
    found = measure(bench_repository())
    print("tokens  " + "  ".join(f"{precision:>9s}" for precision in found) + "   ms a text")
    for length in LENGTHS:
        print(f"{length:6d}  " + "  ".join(f"{times[length]:9.2f}" for times in found.values()))
    result: dict[str, Any] = {"machine": machine(), "batch_size": BATCH_SIZE, "ms_per_text": found}
    write_json(options.out, result)
    if options.plot:
        plot(found, options.plot)
        print(options.plot)


if __name__ == "__main__":
    main()
