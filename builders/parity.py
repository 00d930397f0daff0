"""The gate before anything is placed: does the ONNX tower compute what the PyTorch tower computes?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from builders.towers import ExportFailed, TowerKind, sample_captions, sample_pictures
from tuwen.image_transform import preprocess_image
from tuwen.model import ChineseCLIP
from tuwen.specs import CLS_ID, SEP_ID
from tuwen.tokenizer import default_tokenizer, pack_rows, pad_rows

MIN_COSINE = 0.9999
MAX_ABS_DIFF = 1e-4
NUM_REAL = 16

# What a tower is fed, and the embeddings (B, D) that PyTorch makes of it.
Batch = tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Parity:
    """Worst cosine and largest absolute difference over `num_items` embeddings."""

    min_cosine: float
    max_abs_diff: float
    num_items: int

    @property
    def passed(self) -> bool:
        return self.min_cosine >= MIN_COSINE and self.max_abs_diff <= MAX_ABS_DIFF


def measure_parity(
    model: ChineseCLIP,
    kind: TowerKind,
    onnx_path: Path,
    fingerprint: int,
    num_real: int = NUM_REAL,
    optimise: bool = True,
) -> Parity:
    """Run random and real input of several batch sizes and lengths through both.

    Args:
        num_real: how many pictures or captions of the sample.
        optimise: whether ONNX Runtime may rewrite the graph.
    Raises:
        ExportFailed: the file does not load, or does not carry `fingerprint`.
    """
    session = open_session(onnx_path, optimise)
    cosines, differences = [], []
    for feed, expected in tower_batches(model, kind, num_real):
        embeds, fingerprints, *_ = session.run(None, feed)
        if fingerprints.shape != (len(expected), 1) or (fingerprints != fingerprint).any():
            raise ExportFailed(f"{onnx_path.name}: carries fingerprint {fingerprints.ravel()[0]}, not {fingerprint}")
        cosines.append((embeds * expected).sum(axis=1))
        differences.append(np.abs(embeds - expected).max(axis=1))
    return Parity(
        min_cosine=float(np.concatenate(cosines).min()),
        max_abs_diff=float(np.concatenate(differences).max()),
        num_items=sum(map(len, cosines)),
    )


def open_session(onnx_path: Path, optimise: bool = True) -> ort.InferenceSession:
    """ONNX Runtime on the CPU; unless it may `optimise`, it runs the nodes as they stand.

    Raises:
        ExportFailed: it cannot load the file.
    """
    options = ort.SessionOptions()
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(onnx_path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise ExportFailed(f"{onnx_path.name}: ONNX Runtime cannot load it: {error}") from error


def tower_batches(model: ChineseCLIP, kind: TowerKind, num_real: int = NUM_REAL) -> Iterator[Batch]:
    """Random and real input of several batch sizes and lengths; the real captions are the last batch."""
    return _text_batches(model, num_real) if kind == "text" else _image_batches(model, num_real)


@torch.inference_mode()
def _image_batches(model: ChineseCLIP, num_real: int) -> Iterator[Batch]:
    resolution = model.spec.vision.resolution
    real = [preprocess_image(encoded, resolution) for encoded in sample_pictures(num_real)]
    random = np.random.default_rng(0).standard_normal((4, 3, resolution, resolution), np.float32)
    for pixel_values in (random[:1], random[1:], *(one[None] for one in real)):
        yield {"pixel_values": pixel_values}, model.encode_image(torch.from_numpy(pixel_values), normalize=True).numpy()


@torch.inference_mode()
def _text_batches(model: ChineseCLIP, num_real: int) -> Iterator[Batch]:
    """Packed texts of one length and of many, against the padded ones of training: masking is part of what counts."""
    longest = min(model.spec.context_length, model.spec.text.max_positions)
    random = np.random.default_rng(0)
    for lengths in ((3,), (9,), (16, 16, 16), (longest, 3, longest), ()):
        rows = [[CLS_ID, *random.integers(SEP_ID + 1, model.spec.text.vocab_size, n - 2), SEP_ID] for n in lengths]
        rows = rows or [default_tokenizer().encode_ids(caption, longest) for caption in sample_captions(num_real)]
        padded = torch.from_numpy(pad_rows(rows, longest))
        yield dict(pack_rows(rows)), model.encode_text(padded, normalize=True).numpy()
