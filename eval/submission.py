"""The prediction file of one ELEVATER task, as Chinese-CLIP writes it and the leaderboard takes it.

One JSON object: {"model_name", "dataset_name", "num_trainable_params", "num_params", "num_visual_params",
"num_backbone_params", "n_shot", "rnd_seeds", "predictions"}; predictions (1, pictures, labels) are probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tuwen.files import atomic_file
from tuwen.specs import ModelSpec

# As many as Chinese-CLIP's script keeps; of a thousand labels most are then a plain 0, two bytes with the comma.
DECIMALS = 6


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, and of its image tower."""

    num_params: int
    num_visual_params: int

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelSize:
        """Counted on a model without memory."""
        import torch

        from tuwen.model import ChineseCLIP

        with torch.device("meta"):
            model = ChineseCLIP(spec)
        visual = sum(parameter.numel() for parameter in model.visual.parameters())
        return cls(sum(parameter.numel() for parameter in model.parameters()), visual)


def write_submission(
    path: Path, model_name: str, task: str, size: ModelSize, rows: Iterable[npt.NDArray[np.float32]]
) -> int:
    """Write the file, a row at a time, whole or not at all; returns the number of rows.

    Args:
        rows: probabilities (L,) of each picture, in the order that the leaderboard expects.
    """
    head = {
        "model_name": model_name,
        "dataset_name": task,
        "num_trainable_params": 0,
        "num_params": size.num_params,
        "num_visual_params": size.num_visual_params,
        "num_backbone_params": size.num_params,
        "n_shot": 0,
        "rnd_seeds": [0],
    }
    count = 0
    with atomic_file(path) as file:
        file.write(json.dumps(head, ensure_ascii=False)[:-1].encode())
        file.write(b', "predictions": [[')
        for row in rows:
            file.write((b",\n[" if count else b"\n[") + ",".join(map(_short, row.tolist())).encode() + b"]")
            count += 1
        file.write(b"\n]]}\n")
    return count


def _short(probability: float) -> str:
    rounded = round(probability, DECIMALS)
    return repr(rounded) if rounded % 1 else str(int(rounded))
