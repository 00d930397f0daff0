"""Features as they lie on disk, whatever wrote them: Chinese-CLIP's JSONL, or what `tuwen features` writes in Parquet.

for block in iter_stored(Path("features/images"), "image"): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from eval import chinese_clip_files, feature_files
from eval.chinese_clip_files import Features, Kind
from tuwen.errors import InvalidInput


def iter_stored(path: Path, kind: Kind) -> Iterator[Features]:
    """In blocks, in order, as float32.

    Args:
        path: `*.img_feat.jsonl` or `*.txt_feat.jsonl`, a Parquet file, or a folder of `tuwen features`.
    Raises:
        InvalidInput: it is none of these, is malformed, or an id is no integer or is there twice.
    """
    if not path.is_dir() and path.suffix != ".parquet":
        yield from chinese_clip_files.iter_features(path, kind)
        return
    seen: set[int] = set()
    for ids, embeds in feature_files.iter_features(path):
        for one in ids:
            if not isinstance(one, int):
                raise InvalidInput(f"{path}: {kind}_id is {one[:20]!r}, expected an integer, as predictions have them")
            if one in seen:
                raise InvalidInput(f"{path}: {kind}_id {one} is there twice")
            seen.add(one)
        yield Features(np.array(ids, np.int64), embeds.astype(np.float32))


def read_stored(path: Path, kind: Kind) -> Features:
    """All of it: 4 * D bytes an item in memory; otherwise as `iter_stored`."""
    if not path.is_dir() and path.suffix != ".parquet":
        return chinese_clip_files.read_features(path, kind)
    blocks = list(iter_stored(path, kind))
    if not blocks:
        raise InvalidInput(f"{path}: empty, expected features")
    return Features(np.concatenate([one.ids for one in blocks]), np.concatenate([one.embeds for one in blocks]))


def demand_one_model(image_features: Path, text_features: Path) -> None:
    """Raises InvalidInput where both sides say which model made them and it is not the same; JSONL cannot say."""
    makers = {feature_files.fingerprint_of(path) for path in (image_features, text_features)} - {None}
    if len(makers) > 1:
        raise InvalidInput(f"{image_features} and {text_features} are not of one model, by their fingerprints")
