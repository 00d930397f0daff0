"""The gate before anything is placed: does the ONNX tower compute what the PyTorch tower computes?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from builders.onnx_export import INPUT_NAMES, ExportFailed, TowerKind, example_input
from tuwen.data.pairs import open_pairs
from tuwen.image_transform import preprocess_image
from tuwen.model import ChineseCLIP
from tuwen.specs import CLS_ID, SEP_ID, ModelSpec
from tuwen.tokenizer import default_tokenizer, normalize_text

MIN_COSINE = 0.9999
MAX_ABS_DIFF = 1e-4
NUM_REAL = 16

# The sample pictures and captions that ship with the checkout, so that parity is measured on real input anywhere.
SAMPLES_DIR = Path(__file__).parent.parent / "samples" / "emoji_cn"


@dataclass(frozen=True)
class Parity:
    """Worst cosine and largest absolute difference over `num_items` embeddings."""

    min_cosine: float
    max_abs_diff: float
    num_items: int

    @property
    def passed(self) -> bool:
        return self.min_cosine >= MIN_COSINE and self.max_abs_diff <= MAX_ABS_DIFF


@torch.inference_mode()
def measure_parity(model: ChineseCLIP, kind: TowerKind, onnx_path: Path, fingerprint: int) -> Parity:
    """Run random and real input of several batch sizes and lengths through both.

    Raises:
        ExportFailed: the file does not load, or does not carry `fingerprint`.
    """
    try:
        session = ort.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise ExportFailed(f"{onnx_path.name}: ONNX Runtime cannot load it: {error}") from error
    encode = model.encode_text if kind == "text" else model.encode_image
    cosines, differences = [], []
    for values in _inputs(model.spec, kind):
        embeds, fingerprints = session.run(None, {INPUT_NAMES[kind]: values.numpy()})
        if fingerprints.shape != (len(values), 1) or (fingerprints != fingerprint).any():
            raise ExportFailed(f"{onnx_path.name}: carries fingerprint {fingerprints.ravel()[0]}, not {fingerprint}")
        expected = encode(values, normalize=True).numpy()
        cosines.append((embeds * expected).sum(axis=1))
        differences.append(np.abs(embeds - expected).max(axis=1))
    return Parity(
        min_cosine=float(np.concatenate(cosines).min()),
        max_abs_diff=float(np.concatenate(differences).max()),
        num_items=sum(map(len, cosines)),
    )


def _inputs(spec: ModelSpec, kind: TowerKind) -> Iterator[Tensor]:
    torch.manual_seed(0)
    samples = open_pairs(SAMPLES_DIR, "valid")
    if kind == "image":
        yield example_input(spec, kind, batch=1)
        yield example_input(spec, kind, batch=3)
        pictures = [
            samples.image_bytes(image_id) for image_id in samples.image_ids[:: len(samples.image_ids) // NUM_REAL]
        ]
        for picture in pictures[:NUM_REAL]:
            yield torch.from_numpy(preprocess_image(picture, spec.vision.resolution))[None]
        return
    longest = min(spec.context_length, spec.text.max_positions)
    for batch, length in ((1, 3), (1, 9), (3, 16), (2, longest)):
        input_ids = example_input(spec, kind, batch, length)
        input_ids[:, 0], input_ids[:, -1] = CLS_ID, SEP_ID
        yield input_ids
    captions = [normalize_text(record.text) for record in samples.texts[:: len(samples.texts) // NUM_REAL]]
    # One padded batch: masking is part of what is compared.
    yield torch.from_numpy(default_tokenizer().encode(captions[:NUM_REAL], length=longest))
