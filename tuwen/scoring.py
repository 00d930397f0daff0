"""From embeddings to answers: logits, probabilities, calibrated relevance, and classifiers that are kept in a file.

NumPy only: what a server loads needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from tuwen.errors import InvalidInput
from tuwen.files import atomic_file, write_text

Matrix = npt.NDArray[np.float32]

# Ours. One wording favours the labels that happen to fit it; a few average that out.
DEFAULT_TEMPLATES = ("{}", "{}的照片", "一张{}的图片", "图中有{}")
MAX_LABELS = 10_000
_MAX_FILE_BYTES = 256 << 20
_PLACEHOLDER = "{}"


def softmax(logits: Matrix) -> Matrix:
    """Along the last axis; finite for any finite logits."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Matrix = (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32)
    return result


def fill_templates(labels: Sequence[str], templates: Sequence[str]) -> list[str]:
    """L * T prompts, all of the first label first.

    Raises:
        InvalidInput: no label, too many, a label twice, or a template without exactly one {}.
    """
    if not 1 <= len(labels) <= MAX_LABELS:
        raise InvalidInput(f"there are {len(labels)} labels, expected 1 to {MAX_LABELS}")
    seen: set[str] = set()
    for label in labels:
        if not label.strip():
            raise InvalidInput("a label is empty")
        if label in seen:
            raise InvalidInput(f"label {label[:20]!r} is there twice")
        seen.add(label)
    for template in templates:
        if template.count(_PLACEHOLDER) != 1:
            raise InvalidInput(f"template {template[:40]!r} needs one {{}}, where the label goes")
    return [template.replace(_PLACEHOLDER, label) for label in labels for template in templates or ("{}",)]


def average_prompts(text_embeds: Matrix, num_labels: int) -> Matrix:
    """(L * T, D) of `fill_templates` -> (L, D) of unit length: Chinese-CLIP's prompt ensembling."""
    means = text_embeds.reshape(num_labels, -1, text_embeds.shape[-1]).mean(axis=1)
    unit: Matrix = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
    return unit


@dataclass(frozen=True)
class Classifier:
    """Labels and their vectors: text_embeds float32 (L, D) of unit length."""

    labels: tuple[str, ...]
    text_embeds: Matrix
    fingerprint: int
    templates: tuple[str, ...]

    def save(self, path: Path) -> None:
        """One safetensors file, written whole or not at all."""
        metadata = {
            "fingerprint": str(self.fingerprint),
            "labels": json.dumps(self.labels, ensure_ascii=False),
            "templates": json.dumps(self.templates, ensure_ascii=False),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(save_safetensors({"text_embeds": np.ascontiguousarray(self.text_embeds)}, metadata))


def load_classifier(path: Path) -> Classifier:
    """Read what `Classifier.save` wrote.

    Raises:
        InvalidInput: it is no such file.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InvalidInput(f"classifier {path.stem} is larger than {_MAX_FILE_BYTES >> 20} MiB")
        with safe_open(path, "numpy") as file:
            metadata, text_embeds = file.metadata() or {}, file.get_tensor("text_embeds")
        labels = tuple(json.loads(metadata["labels"]))
        found = Classifier(labels, text_embeds, int(metadata["fingerprint"]), tuple(json.loads(metadata["templates"])))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InvalidInput(f"classifier {path.stem} cannot be read: {type(error).__name__}") from error
    if text_embeds.ndim != 2 or len(text_embeds) != len(labels) or text_embeds.dtype != np.float32:
        raise InvalidInput(f"classifier {path.stem}: {len(labels)} labels, but vectors {text_embeds.shape}")
    return found


@dataclass(frozen=True)
class Calibration:
    """What a cosine of one model means in one domain: relevance = sigmoid(slope * cosine + intercept).

    A relevance of 0.5 is a cosine as likely between a picture and its own text as between strangers; below
    `min_relevance` there is no match. The rates are those of pairs that the fit did not see.
    """

    slope: float
    intercept: float
    min_relevance: float
    fingerprint: int
    num_pairs: int
    true_match_rate: float
    false_match_rate: float

    def relevance(self, cosine: Matrix) -> Matrix:
        """Float32 in 0..1, of cosines of any shape."""
        logit = np.clip(self.slope * cosine + self.intercept, -80, 80)
        result: Matrix = (1 / (1 + np.exp(-logit))).astype(np.float32)
        return result

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")


def load_calibration(path: Path) -> Calibration:
    """Read what `Calibration.save` wrote.

    Raises:
        InvalidInput: it is no such file.
    """
    try:
        if path.stat().st_size > 1 << 16:
            raise ValueError("too large")
        values = json.loads(path.read_text(encoding="utf-8"))
        return Calibration(**{name: kind(values[name]) for name, kind in _CALIBRATION_TYPES.items()})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"calibration {path.stem} cannot be read: {type(error).__name__}") from error


_CALIBRATION_TYPES = {
    "slope": float, "intercept": float, "min_relevance": float, "fingerprint": int,
    "num_pairs": int, "true_match_rate": float, "false_match_rate": float,
}  # fmt: skip


def fit_calibration(matching: Matrix, strangers: Matrix, fingerprint: int, min_relevance: float = 0.5) -> Calibration:
    """Fit on every other pair and measure on the rest; both kinds weigh the same, however many there are.

    Platt's scaling (Platt 1999) by Newton's method: two numbers, a convex loss.

    Args:
        matching: (P,) cosines of pictures with their own texts.
        strangers: (S,) cosines of pictures with other texts.
    Raises:
        InvalidInput: fewer than ten of either, or matching pairs are no closer than strangers.
    """
    if min(len(matching), len(strangers)) < 10:
        raise InvalidInput(f"{len(matching)} matching and {len(strangers)} other pairs: too few to calibrate with")
    if matching.mean() <= strangers.mean():
        raise InvalidInput("pictures are no closer to their own texts than to others: this model is of no use here")
    slope, intercept = _fit_logistic(matching[::2].astype(np.float64), strangers[::2].astype(np.float64))
    fitted = Calibration(slope, intercept, min_relevance, fingerprint, len(matching), 0.0, 0.0)
    true_rate, false_rate = (
        float((fitted.relevance(held_out[1::2]) >= min_relevance).mean()) for held_out in (matching, strangers)
    )
    return Calibration(slope, intercept, min_relevance, fingerprint, len(matching), true_rate, false_rate)


def _fit_logistic(matching: npt.NDArray[np.float64], strangers: npt.NDArray[np.float64]) -> tuple[float, float]:
    cosines = np.concatenate([matching, strangers])
    targets = np.repeat([1.0, 0.0], [len(matching), len(strangers)])
    weights = np.repeat([0.5 / len(matching), 0.5 / len(strangers)], [len(matching), len(strangers)])
    centre, spread = cosines.mean(), cosines.std() or 1.0
    inputs = np.stack([(cosines - centre) / spread, np.ones_like(cosines)])
    parameters = np.zeros(2)
    for _ in range(50):
        predicted = 1 / (1 + np.exp(-np.clip(parameters @ inputs, -80, 80)))
        # A trace of ridge keeps the slope finite where the two kinds do not overlap.
        gradient = inputs @ (weights * (predicted - targets)) + 1e-4 * parameters
        hessian = (inputs * (weights * predicted * (1 - predicted))) @ inputs.T + 1e-4 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        parameters -= step
        if np.abs(step).max() < 1e-9:
            break
    slope = parameters[0] / spread
    return float(slope), float(parameters[1] - slope * centre)
