"""What a teacher is worth: one student with and without, equal steps, several seeds; recall on a style not trained on.

    tuwen data emoji --out data/emoji_cn
    python -m perf.distillation

Nine runs of a few minutes each on one core: alone, with the teacher, and with what it said of the plain pictures, read
from disk. A run that is finished is not repeated, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from perf.rounds import machine, write_json

RECIPE = Path("training/recipes/emoji_distill.toml")
RUNS_DIR = Path("runs/distillation")
TEACHER = Path("samples/emoji_tiny")
FEATURES = RUNS_DIR / "features"

NO_TEACHER = ("distill.teacher=none",)
SIDES: dict[str, tuple[str, ...]] = {
    "alone": (*NO_TEACHER, "distill.feature_weight=0", "distill.logit_weight=0"),
    "teacher": (),
    "stored": (*NO_TEACHER, f"distill.features={FEATURES}"),
}
FIGURES = ("text to image R@10", "image to text R@10", "mean recall")


def run_tuwen(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "tuwen.cli", *arguments], check=True)


def trained(side: str, seed: int) -> dict[str, float]:
    """The figures of a run, which is made unless it is there."""
    out = RUNS_DIR / f"{side}_{seed}"
    settings = (*SIDES[side], f"run.seed={seed}", f"run.out={out}")
    run_tuwen("train", str(RECIPE), *(part for one in settings for part in ("--set", one)))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [record for record in records if record["kind"] == "validation"][-1]
    values = (last["text_to_image"]["r10"], last["image_to_text"]["r10"], last["mean_recall"])
    return dict(zip(FIGURES, values, strict=True))


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Mean and range over the seeds, as Markdown."""
    lines = ["| student | " + " | ".join(FIGURES) + " |", "|---|" + "---|" * len(FIGURES)]
    for side, runs in found.items():
        columns = [[100 * run[figure] for run in runs] for figure in FIGURES]
        cells = [f"{statistics.mean(column):.1f}% ({min(column):.1f} to {max(column):.1f})" for column in columns]
        lines.append(f"| {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    if "stored" in options.sides:
        run_tuwen("teacher-features", str(RECIPE), "--checkpoint", str(TEACHER), "--out", str(FEATURES))
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for seed in options.seeds:
        for side, runs in found.items():
            runs.append(trained(side, seed))
    print(table(found))
    result: dict[str, Any] = {"machine": machine(), "seeds": options.seeds, "figures": found}
    write_json(RUNS_DIR / "distillation.json", result)


if __name__ == "__main__":
    main()
