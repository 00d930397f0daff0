"""Retrieval figures of features that were extracted before: a folder of `tuwen features`, or Chinese-CLIP's two JSONL.

tuwen eval retrieval --features features --data samples/emoji_cn
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eval.feature_files import JSONL_ENDING, MANIFEST_NAME, fingerprint_of, open_features, read_manifest
from eval.feature_sources import Side
from eval.retrieval import EmbeddedPairs, Embeddings, RetrievalResult, score_stored
from tuwen.data.pairs import PairSet
from tuwen.errors import InvalidInput

# As Chinese-CLIP names them. Source: its extract_features.py
_JSONL_STEM: dict[Side, str] = {"images": "imgs", "texts": "texts"}


def score_features(folder: Path, pairs: PairSet, data: str, split: str) -> tuple[RetrievalResult, EmbeddedPairs]:
    """As `evaluate_retrieval`, of stored features; float16 ones are ranked in float32.

    Args:
        folder: with `images` and `texts` of `tuwen features`, or with SPLIT_imgs.img_feat.jsonl and
            SPLIT_texts.txt_feat.jsonl.
        data, split: names, for the result.
    Raises:
        InvalidInput: neither is there, a file is malformed, the two are of two models, or an item has no features.
    """
    images, texts = (_features_path(folder, side, split) for side in ("images", "texts"))  # type: ignore[arg-type]
    fingerprint, other = fingerprint_of(images), fingerprint_of(texts)
    if fingerprint != other:
        raise InvalidInput(f"{images} is of model {fingerprint}, {texts} of {other}: they cannot be compared")
    model = read_manifest(images).model if (images / MANIFEST_NAME).is_file() else folder.resolve().name
    return score_stored(pairs, _read(images), _read(texts), model, data, split, fingerprint)


def _features_path(folder: Path, side: Side, split: str) -> Path:
    jsonl = folder / f"{split}_{_JSONL_STEM[side]}.{JSONL_ENDING[side]}"
    for path in (folder / side, jsonl):
        if path.exists():
            return path
    raise InvalidInput(f"{folder}: neither {side} of `tuwen features` in it nor {jsonl.name}")


def _read(path: Path) -> tuple[list[int], Embeddings]:
    ids, embeddings = open_features(path)
    if not all(isinstance(one, int) for one in ids):
        raise InvalidInput(f"{path}: ids are strings, expected those of the pairs")
    return [int(one) for one in ids], np.asarray(embeddings, np.float32)
