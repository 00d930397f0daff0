"""A tower in int8: weights per channel, activations as they come, and what that costs in cosine and in recall.

ONNX Runtime's dynamic quantisation; attention scores, LayerNorm and softmax stay in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

from builders.feeds import Feed, image_feeds, text_feeds
from builders.parity import open_session
from builders.towers import SAMPLES_DIR, TOWERS, ExportFailed, TowerKind
from tuwen.data.pairs import open_pairs
from tuwen.retrieval import recall_at_k
from tuwen.tokenizer import normalize_text

MIN_COSINE = 0.999
MAX_RECALL_LOSS = 0.005
RECALL_K = 10
# Of Emoji-CN's held-out style: every second or third picture with all its captions. A base tower takes two minutes.
MAX_GATE_IMAGES = 640
_BATCH_SIZE = 32

Embeds = npt.NDArray[np.float32]
Embed = Callable[[Feed], Embeds]


@dataclass(frozen=True)
class QuantizationCost:
    """int8 against float32 over the same real pictures and captions.

    Attributes:
        min_cosine: of each tower's worst item, between its two embeddings.
        recall_at_10: text to image, as a fraction, of int8 towers; `recall_at_10_fp32` of the others.
    """

    min_cosine: dict[TowerKind, float]
    recall_at_10: float
    recall_at_10_fp32: float
    num_images: int
    num_texts: int

    @property
    def passed(self) -> bool:
        return self.keeps_recall and all(cosine >= MIN_COSINE for cosine in self.min_cosine.values())

    @property
    def keeps_recall(self) -> bool:
        return self.recall_at_10 >= self.recall_at_10_fp32 - MAX_RECALL_LOSS


def quantize_tower(onnx_path: Path, int8_path: Path) -> None:
    """Write the tower with int8 weights to `int8_path`.

    Raises:
        ExportFailed: ONNX Runtime cannot quantise it.
    """
    prepared = int8_path.with_name("prepared.onnx")
    logging.getLogger().disabled = True  # the quantiser logs advice to the root logger that does not apply here
    try:
        # Symbolic shape inference adds nothing to MatMul with constant weights, and needs sympy.
        quant_pre_process(onnx_path, prepared, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            int8_path,
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Weights of 7 bits: without VNNI two products of 8 bits overflow the 16 bits that AVX2 adds them in.
            # Seen on the sample's text tower: worst cosine 0.994 with 8 bits, 0.9996 with 7, at the same speed.
            reduce_range=True,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
    except Exception as error:  # its exceptions share no base class
        raise ExportFailed(f"{onnx_path.name}: ONNX Runtime cannot quantise it: {error}") from error
    finally:
        logging.getLogger().disabled = False
        prepared.unlink(missing_ok=True)


def measure_cost(
    fp32: dict[TowerKind, Embed], int8: dict[TowerKind, Embed], resolution: int, context_length: int
) -> QuantizationCost:
    """Embed part of Emoji-CN with both precisions.

    Args:
        resolution: of pixel_values.
        context_length: longest text in tokens.
    """
    pairs = open_pairs(SAMPLES_DIR, "valid")
    step = -(-len(pairs.image_ids) // MAX_GATE_IMAGES)
    image_ids = list(pairs.image_ids)[::step]
    texts = [record for record in pairs.texts if set(record.image_ids) & set(image_ids)]
    feeds: dict[TowerKind, Iterator[Feed]] = {
        "image": image_feeds((pairs.image_bytes(one) for one in image_ids), resolution, _BATCH_SIZE),
        "text": text_feeds((normalize_text(record.text) for record in texts), context_length, _BATCH_SIZE),
    }
    embeds = {kind: _embed_with_both(feeds[kind], fp32[kind], int8[kind]) for kind in TOWERS}
    relevant = np.array([[one in record.image_ids for one in image_ids] for record in texts])
    recalls = [recall_at_k(embeds["text"][which] @ embeds["image"][which].T, relevant, RECALL_K) for which in range(2)]
    cosines = {kind: float((a * b).sum(axis=1).min()) for kind, (a, b) in embeds.items()}
    return QuantizationCost(cosines, recalls[1], recalls[0], len(image_ids), len(texts))


def open_embed(onnx_path: Path, optimise: bool = True) -> Embed:
    """A tower on ONNX Runtime: a feed -> embeddings (B, D)."""
    session = open_session(onnx_path, optimise)
    name = session.get_outputs()[0].name

    def embed(feed: Feed) -> Embeds:
        embeds: Embeds = session.run([name], feed)[0]
        return embeds

    return embed


def _embed_with_both(feeds: Iterator[Feed], *embeds: Embed) -> tuple[Embeds, ...]:
    """(N, D) of each, over the same input."""
    rows = [[embed(feed) for embed in embeds] for feed in feeds]
    return tuple(np.concatenate(batches) for batches in zip(*rows, strict=True))
