"""What is known of a run while it goes on: a record a step, a record a validation, and the file that keeps them.

    log = MetricsLog(out / "metrics.jsonl")
    log.rewind(step)                    # on resume: what came after the checkpoint happens again
    log.append(record)
    list(read_metrics(out / "metrics.jsonl"))

A line is one JSON object, {"kind": "step", ...} or {"kind": "validation", ...}.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tuwen.embed import RetrievalScores
from tuwen.files import atomic_file

METRICS_FILE = "metrics.jsonl"
_DIRECTIONS = {"text_to_image", "image_to_text"}


@dataclass(frozen=True)
class StepRecord:
    """One update of the weights.

    Attributes:
        step: updates so far, this one among them.
        epoch: from 1.
        grad_norm: before clipping; NaN or infinite where fp16 overflowed and the update was left out.
        logit_scale: the learned log's exponential.
        samples_per_s: of all processes together.
        step_s: how long it took, `data_wait_s` of it waiting for the batch.
        num_unreadable: pictures skipped so far, in this process.
        image_accuracy, text_accuracy: within the batch, with run.report_batch_accuracy.
        distill_loss: the teacher's part of the loss.
        loss_scale: of fp16.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    grad_norm: float
    logit_scale: float
    samples_per_s: float
    step_s: float
    data_wait_s: float
    num_unreadable: int = 0
    image_accuracy: float | None = None
    text_accuracy: float | None = None
    distill_loss: float | None = None
    loss_scale: float | None = None


@dataclass(frozen=True)
class ValidationRecord:
    """Recall on the held-out pairs after a step, and accuracy on held-out classes where there are any."""

    step: int
    epoch: int
    text_to_image: RetrievalScores
    image_to_text: RetrievalScores
    elapsed_s: float
    zero_shot_accuracy: float | None = None

    @property
    def mean_recall(self) -> float:
        """Of both directions: what the best checkpoint is best by."""
        return (self.text_to_image.mean_recall + self.image_to_text.mean_recall) / 2


Record = StepRecord | ValidationRecord


class MetricsLog:
    """Appends records to a file; each is on its way to the disk when `append` returns, so a kill loses none."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def append(self, record: Record) -> None:
        line = json.dumps(_to_json(record), allow_nan=False) + "\n"
        # Opened for each line: a rewind replaces the file, and the operating system keeps what is written to it.
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())

    def rewind(self, step: int) -> None:
        """Leave out what came after `step`, and a last line that a kill cut short; 0 begins anew."""
        if not self.path.exists():
            return
        with atomic_file(self.path) as kept, open(self.path, "rb") as file:
            for line in file:
                record = _parse(line)
                if record is not None and record.step <= step:
                    kept.write(line.rstrip(b"\n") + b"\n")


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of a metrics.jsonl, in order; lines that are none (cut short, of a later version) are passed over."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if record := _parse(line):
                yield record


def best_validation(path: Path, until_step: int) -> ValidationRecord | None:
    """Of a metrics.jsonl, the validation with the highest mean recall up to a step; None where there is none."""
    found = (one for one in read_metrics(path) if isinstance(one, ValidationRecord) and one.step <= until_step)
    return max(found, key=lambda record: record.mean_recall, default=None)


def _to_json(record: Record) -> dict[str, Any]:
    """JSON has no NaN: what is not finite is null; what is not there is left out."""
    values: dict[str, Any] = {name: _finite(value) for name, value in asdict(record).items() if value is not None}
    if isinstance(record, StepRecord):
        return {"kind": "step", **values}
    for direction in _DIRECTIONS:
        values[direction]["mean_recall"] = getattr(record, direction).mean_recall
    return {"kind": "validation", **values, "mean_recall": record.mean_recall}


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: bytes) -> Record | None:
    """The record of a line; None where it is none."""
    try:
        values = json.loads(line)
        kind = {"step": StepRecord, "validation": ValidationRecord}[values["kind"]]
        known = {field.name: values[field.name] for field in fields(kind) if field.name in values}
        known = {name: math.nan if value is None else value for name, value in known.items()}
        for direction in _DIRECTIONS & known.keys():
            scores = known[direction]
            known[direction] = RetrievalScores(*(scores[field.name] for field in fields(RetrievalScores)))
        return kind(**known)
    except (ValueError, KeyError, TypeError):
        return None
