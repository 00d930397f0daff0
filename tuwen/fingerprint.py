"""One number for what makes an embedding: weights, tokeniser and preprocessing.

It is baked into the exported towers as an output beside the embeddings, so that a vector never arrives without
the identity of the model that made it, and a client can refuse to compare vectors of two models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from tuwen.specs import IMAGE_MEAN, IMAGE_STD, ModelSpec
from tuwen.tokenizer import VOCAB_PATH

# Raised by hand when tokenizer.py or image_transform.py changes what it computes.
TOKENIZER_VERSION = "bert-wordpiece, lower case, straight quotes, 1"
TRANSFORM_VERSION = "resize in own mode bicubic, rgb, 1"


def model_fingerprint(spec: ModelSpec, state_dict: Mapping[str, Tensor]) -> int:
    """63 bits, never 0: the head of a SHA-256 over the weights (as float32), vocabulary and transform settings."""
    digest = hashlib.sha256()
    settings = {
        "architecture": spec.to_dict(),
        "tokenizer": TOKENIZER_VERSION,
        "vocabulary": hashlib.sha256(VOCAB_PATH.read_bytes()).hexdigest(),
        "transform": TRANSFORM_VERSION,
        "mean": IMAGE_MEAN,
        "std": IMAGE_STD,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for key in sorted(state_dict):
        value = state_dict[key].detach().cpu().contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update((value.float() if value.is_floating_point() else value).numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1 or 1
