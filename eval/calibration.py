"""What a cosine means in one domain: pairs of a data set through a running server -> a calibration file.

tuwen calibrate --data data/emoji_cn --domain emoji
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tuwen_client import Client

from tuwen.data.pairs import open_pairs
from tuwen.errors import InvalidInput
from tuwen.scoring import Calibration, fit_calibration

MAX_IMAGES = 2000
_STRANGERS_PER_PAIR = 10


def calibrate(
    client: Client,
    data: Path,
    split: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    seed: int = 0,
) -> Calibration:
    """Fit on pictures with their own texts, and with ten other pictures' texts each.

    Args:
        data: folder of an LMDB, or of TSV and JSONL files; at most 2,000 of its pictures are used.
    Raises:
        InvalidInput: too few pairs, or the model does not tell own texts from others.
    """
    pairs = open_pairs(data, split)
    random = np.random.default_rng(seed)
    image_ids = list(pairs.image_ids)
    if len(image_ids) > MAX_IMAGES:
        image_ids = [image_ids[index] for index in sorted(random.choice(len(image_ids), MAX_IMAGES, replace=False))]
    position = {image_id: index for index, image_id in enumerate(image_ids)}
    records = [record for record in pairs.texts if any(one in position for one in record.image_ids)]
    if not records:
        raise InvalidInput(f"{data}: no text of split {split} belongs to a picture of it")
    image_embeds = client.embed_images(
        (pairs.image_bytes(one) for one in image_ids), lambda done: on_progress(done, len(image_ids))
    )
    text_embeds = client.embed_text([record.text for record in records])
    own = [(row, position[one]) for row, record in enumerate(records) for one in record.image_ids if one in position]
    others = np.stack([random.integers(0, len(records), _STRANGERS_PER_PAIR * len(image_ids)),
                       np.repeat(np.arange(len(image_ids)), _STRANGERS_PER_PAIR)], axis=1)  # fmt: skip
    belongs = set(own)
    strangers = [pair for pair in map(tuple, others.tolist()) if pair not in belongs]
    matching_cosines, stranger_cosines = (
        np.einsum("nd,nd->n", text_embeds[list(rows)], image_embeds[list(columns)])
        for rows, columns in (zip(*some, strict=True) for some in (own, strangers))
    )
    return fit_calibration(
        random.permutation(matching_cosines), random.permutation(stranger_cosines), client.fingerprint
    )
