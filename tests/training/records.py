"""Records of a run that did not take place."""

from __future__ import annotations

from training.metrics import StepRecord, ValidationRecord
from tuwen.embed import RetrievalScores


def step_record(step: int, loss: float = 2.5, grad_norm: float = 0.75) -> StepRecord:
    """Of 512 samples in a second, a quarter of it waited for."""
    return StepRecord(
        step=step,
        epoch=1 + step // 10,
        loss=loss,
        lr=3e-4,
        grad_norm=grad_norm,
        logit_scale=14.25,
        samples_per_s=512,
        step_s=1.0,
        data_wait_s=0.25,
    )


def validation_record(step: int, r1: float = 0.25, zero_shot_accuracy: float | None = None) -> ValidationRecord:
    """R@1 as given, and the other direction always the same."""
    return ValidationRecord(
        step=step,
        epoch=1 + step // 10,
        text_to_image=RetrievalScores(r1, 0.5, 0.75, 5942),
        image_to_text=RetrievalScores(0.125, 0.375, 0.625, 1852),
        elapsed_s=3.5,
        zero_shot_accuracy=zero_shot_accuracy,
    )
