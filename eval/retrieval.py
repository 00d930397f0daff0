"""Retrieval recall of a checkpoint on a set of pairs.

tuwen eval retrieval --checkpoint samples/emoji_tiny --data samples/emoji_cn
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tuwen.checkpoint import load_checkpoint
from tuwen.data.pairs import open_pairs
from tuwen.embed import score_retrieval
from tuwen.model import resolve_device


def evaluate_checkpoint(
    checkpoint: Path,
    data: Path,
    split: str = "valid",
    device: str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Recall in both directions, as fractions: {"architecture", "split", "num_images", "text_to_image": {"r1", ...}}.

    Raises:
        InvalidInput: the checkpoint or the data cannot be read.
    """
    model = load_checkpoint(checkpoint).to(resolve_device(device))
    pairs = open_pairs(data, split)
    num_images = len(pairs.image_ids)
    scores = score_retrieval(model, pairs, on_batch=lambda done: on_progress(done, num_images))
    result: dict[str, Any] = {"architecture": model.spec.name, "split": split, "num_images": num_images}
    for direction, figures in scores.items():
        result[direction] = asdict(figures) | {"mean_recall": figures.mean_recall}
    return result
