"""Core ML packages of every architecture: how large, how close to PyTorch, of which operations; and what they find.

    python -m perf.coreml --docs docs/coreml_figures.md

The five published architectures at their real size with random weights, and the sample; the sample's packages also
over all of Emoji-CN. One process an architecture and precision, so that memory is that of one tower; what is in --out
already is not measured again. Everything by builders.mil_evaluator: no figure here was taken on an Apple device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from builders.coreml_export import ExportResult, Request, export_model
from builders.coreml_parity import pad_length
from builders.coreml_towers import Precision, text_buckets
from builders.mil_evaluator import Package, load_package
from builders.towers import SAMPLES_DIR, TOWERS, TowerKind
from perf.rounds import machine, write_json
from tuwen.checkpoint import load_checkpoint
from tuwen.data.pairs import open_pairs
from tuwen.embed import Embeddings, RetrievalSet, embed_pictures, embed_texts
from tuwen.image_transform import decode_image, resize_image
from tuwen.model import ChineseCLIP
from tuwen.specs import get_spec
from tuwen.tokenizer import default_tokenizer, normalize_text, pad_rows

SAMPLE_DIR = Path("samples/emoji_tiny")
SAMPLE = "sample"
ARCHITECTURES = (SAMPLE, "RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14")
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
NUM_REAL = {SAMPLE: 16}
# A picture of a large tower takes NumPy seconds; random weights make one picture as telling as another.
NUM_REAL_OF_RANDOM = 2
# Points of recall@10 that a precision may lose; the others have no bound and are shown.
MAX_RECALL_LOSS: dict[Precision, float] = {"fp32": 0.0005, "fp16": 0.005, "palette8": 0.015}


def random_model(name: str) -> ChineseCLIP:
    """Of real size, the same on every run; no batch norm switches its block off, as fresh ones do."""
    torch.manual_seed(0)
    model = ChineseCLIP(get_spec(name)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return model


def measure(architecture: str, precision: Precision, minimum_ios: int) -> dict[str, Any]:
    """Export one model in one precision, and for the sample retrieve by it."""
    is_sample = architecture == SAMPLE
    model = load_checkpoint(SAMPLE_DIR) if is_sample else random_model(architecture)
    request = Request((precision,), minimum_ios, num_real=NUM_REAL.get(architecture, NUM_REAL_OF_RANDOM))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ios"
        result = export_model(model, architecture, out, request, lambda stage: print(stage, file=sys.stderr))
        found = {"towers": {kind: _tower(result, precision, kind) for kind in TOWERS}}
        return found | ({"recall_at_10": retrieve(model, result)} if is_sample else {})


def _tower(result: ExportResult, precision: Precision, kind: TowerKind) -> dict[str, Any]:
    tower = result.towers[precision][kind]
    return {"size_bytes": tower.size_bytes, "operations": tower.operations} | vars(tower.parity)


def retrieve(model: ChineseCLIP, result: ExportResult) -> dict[str, float]:
    """Text to image over all of Emoji-CN's held-out style, by the packages and by PyTorch."""
    pairs = open_pairs(SAMPLES_DIR, "valid")
    chosen = RetrievalSet.of(pairs)
    (both,) = result.towers.values()
    image, text = (load_package(result.out / both[kind].path) for kind in ("image", "text"))
    resolution = model.spec.vision.resolution
    pictures = [resize_image(decode_image(pairs.image_bytes(one)), resolution) for one in chosen.image_ids]
    by_packages = chosen.score(
        np.concatenate([image.run({"image": pixels})["image_embeds"] for pixels in pictures]),
        _embed_texts(text, chosen.texts, text_buckets(model.spec)),
    )
    by_pytorch = chosen.score(embed_pictures(model, pairs, chosen.image_ids), embed_texts(model, chosen.texts))
    sides = {"packages": by_packages, "pytorch": by_pytorch}
    return {side: scores["text_to_image"].r10 for side, scores in sides.items()}


def _embed_texts(package: Package, texts: Sequence[str], buckets: Sequence[int]) -> Embeddings:
    """(T, D), each text padded as an app pads it."""
    tokenizer = default_tokenizer()
    rows = [tokenizer.encode_ids(normalize_text(text), buckets[-1]) for text in texts]
    inputs = (pad_rows([row], pad_length(len(row), buckets)).astype(np.int32) for row in rows)
    return np.concatenate([package.run({"input_ids": input_ids})["text_embeds"] for input_ids in inputs])


def failures(found: dict[str, Any]) -> list[str]:
    """Sentences for each recall that a precision loses too much of."""
    said = []
    for precision, allowed in MAX_RECALL_LOSS.items():
        recall = found.get(f"{SAMPLE} {precision}", {}).get("recall_at_10")
        if recall and recall["pytorch"] - recall["packages"] > allowed:
            said.append(
                f"{precision}: recall@10 {recall['packages']:.1%}, PyTorch's {recall['pytorch']:.1%}; expected a loss "
                f"of at most {100 * allowed:g} points"
            )
    return said


def as_markdown(results: dict[str, Any]) -> str:
    """docs/coreml_figures.md."""
    found = results["found"]
    lines = [
        "# Core ML packages in figures",
        "",
        "Made by `python -m perf.coreml`; see its docstring. The sample has its trained weights, the others random "
        "ones at their real size. Parity is the worst item's, the saved package against PyTorch by "
        "`builders/mil_evaluator`: a check of the program and of its weights, not of Apple's hardware.",
        "",
        f"Packages for iOS {results['minimum_ios']} and later; coremltools {version('coremltools')}, torch "
        f"{results['machine']['torch']}.",
        "",
        "## Size and parity",
        "",
        "| architecture | precision | image MB | text MB | image cosine | text cosine | largest difference | items |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ordered = [f"{name} {each}" for name in ARCHITECTURES for each in PRECISIONS if f"{name} {each}" in found]
    for key in ordered:
        one, (architecture, precision) = found[key], key.split(" ")
        image, text = one["towers"]["image"], one["towers"]["text"]
        lines.append(
            f"| {architecture} | {precision} | {image['size_bytes'] / 1e6:.1f} | {text['size_bytes'] / 1e6:.1f} "
            f"| {image['min_cosine']:.6f} | {text['min_cosine']:.6f} "
            f"| {max(image['max_abs_diff'], text['max_abs_diff']):.1e} | {image['num_items']} + {text['num_items']} |"
        )
    missing = [f"{name} {each}" for name in ARCHITECTURES for each in PRECISIONS if f"{name} {each}" not in found]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    lines += ["", "## What the sample's packages find", "", *_recall_lines(found)]
    return "\n".join([*lines, "", "## Operations of the programs", "", *_operation_lines(found), ""])


def _recall_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "Emoji-CN's held-out style, 5,942 texts against 1,852 pictures, recall@10; every embedding by the evaluator, "
        "one picture or text at a time.",
        "",
        "| precision | packages | PyTorch | difference in points | allowed loss |",
        "|---|---|---|---|---|",
    ]
    for precision in PRECISIONS:
        if recall := found.get(f"{SAMPLE} {precision}", {}).get("recall_at_10"):
            difference = 100 * (recall["packages"] - recall["pytorch"])
            allowed = f"{100 * MAX_RECALL_LOSS[precision]:g}" if precision in MAX_RECALL_LOSS else "none set"
            lines.append(
                f"| {precision} | {recall['packages']:.2%} | {recall['pytorch']:.2%} | {difference:+.2f} | {allowed} |"
            )
    return lines


def _operation_lines(found: dict[str, Any]) -> list[str]:
    """A row for each architecture and tower: kinds do not depend on the precision but for casts and weights."""
    lines = ["| architecture | tower | operations, all precisions together, most often first |", "|---|---|---|"]
    for architecture in ARCHITECTURES:
        for kind in TOWERS:
            counts: Counter[str] = Counter()
            for key, one in found.items():
                if key.split(" ")[0] == architecture:
                    counts |= Counter(one["towers"][kind]["operations"])
            if counts:
                named = ", ".join(f"{number} {operation}" for operation, number in counts.most_common())
                lines.append(f"| {architecture} | {kind} | {named} |")
    return lines


def _measure_in_process(architecture: str, precision: str, minimum_ios: int) -> dict[str, Any]:
    """In a process of its own, whose memory goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "perf.coreml", "--one", architecture, precision, "--out", str(out)]
        subprocess.run([*command, "--target", str(minimum_ios)], check=True)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--target", type=int, default=16, help="oldest iOS")
    parser.add_argument("--out", type=Path, default=Path(".cache/bench/coreml.json"))
    parser.add_argument("--docs", type=Path, help="write the tables there")
    parser.add_argument("--one", nargs=2, metavar=("ARCHITECTURE", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        write_json(options.out, measure(options.one[0], options.one[1], options.target))
        return
    results: dict[str, Any] = {"machine": machine(), "minimum_ios": options.target, "found": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    for name, precision in itertools.product(options.architectures, options.precisions):
        if (key := f"{name} {precision}") not in results["found"]:
            print(key, file=sys.stderr)
            results["found"][key] = _measure_in_process(name, precision, options.target)
            write_json(options.out, results)
    tables = as_markdown(results)
    print(tables)
    if options.docs:
        options.docs.write_text(tables, encoding="utf-8")
    if said := failures(results["found"]):
        sys.exit("\n".join(said))


if __name__ == "__main__":
    main()
