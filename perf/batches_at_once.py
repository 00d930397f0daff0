"""Batches side by side, or one on all cores: which answers more texts? ONNX Runtime alone, no server.

    python -m perf.batches_at_once          # ViT-B-16, random weights, both precisions: two minutes after a first build

The sides alternate; median texts per second and the median of the ratios within a round. What the answer became:
`batches_at_once` in the config of a text tower.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort

from perf.rounds import alternate, median_ratio, medians, rate_of
from perf.serving import FP32, INT8, bench_repository
from perf.workload import muge_like_texts
from tuwen.tokenizer import default_tokenizer, normalize_text, pack_rows

ROUNDS = 7
NUM_TEXTS = 256
BATCHES = (4, 8, 16, 32)
AT_ONCE = 2  # each on half of the cores, as the text towers' configs have it


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """As the embedded backend opens it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_all(session: ort.InferenceSession, at_once: int, feeds: Sequence[dict[str, Any]]) -> None:
    """Every batch, so many of them side by side."""
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(partial(session.run, ["text_embeds"]), feeds):
            pass


def compare(path: Path, ids: Sequence[Sequence[int]], cores: int) -> None:
    together, apart = open_session(path, cores), open_session(path, max(1, cores // AT_ONCE))
    for batch in BATCHES:
        feeds = [pack_rows(ids[start : start + batch]) for start in range(0, len(ids), batch)]
        sides: dict[str, Callable[[], float]] = {
            "together": rate_of(partial(run_all, together, 1, feeds), len(ids)),
            "apart": rate_of(partial(run_all, apart, AT_ONCE, feeds), len(ids)),
        }
        for measure in sides.values():
            measure()
        found = alternate(sides, ROUNDS)
        rates = medians(found)
        ratio = median_ratio(found, "apart", "together")
        print(f"  {batch:5d}  {rates['together']:12.0f}  {rates['apart']:12.0f}  {ratio:5.2f}", flush=True)


def main() -> None:
    repository, cores = bench_repository(), len(os.sched_getaffinity(0))
    ids = [default_tokenizer().encode_ids(normalize_text(text)) for text in muge_like_texts(NUM_TEXTS, seed=1)]
    for name in (FP32, INT8):
        print(f"{name}, {cores} cores, texts/s\n  batch  one on all  side by side  ratio")
        compare(repository / f"{name}_text_tower" / "1" / "model.onnx", ids, cores)


if __name__ == "__main__":
    main()
