"""What a classification is worth: predictions and truths in, one figure out. NumPy only.

As ELEVATER measures them, so that a figure may stand beside a published one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]
Truths = npt.NDArray[np.bool_]

# Downwards, and rounded as NumPy does it: a recall of exactly 3/10 counts as ELEVATER's evaluator counts it.
_RECALLS = np.linspace(1, 0, 11)


def mean_per_class(predicted: Labels, truth: Labels) -> float:
    """Accuracy of each class that has a picture, averaged: a rare class weighs as much as a common one.

    Args:
        predicted, truth: (N,).
    Raises:
        ValueError: there is nothing to measure.
    """
    if not len(truth):
        raise ValueError("no pictures")
    num_labels = int(truth.max()) + 1
    counts = np.bincount(truth, minlength=num_labels)
    right = np.bincount(truth[predicted == truth], minlength=num_labels)
    return float((right[counts > 0] / counts[counts > 0]).mean())


def map_11_points(scores: Floats, relevant: Truths) -> float:
    """Mean over the labels of average precision at the recalls 0, 0.1 ... 1: VOC 2007's metric.

    A label's precision at recall 0 is 1, whatever comes first: the evaluator behind the published figures
    (vision-evaluation, over scikit-learn's curve) begins its curve there. Labels of no picture take no part.

    Args:
        scores: (N, L), higher is likelier.
        relevant: (N, L) bool, several labels a picture or none.
    Raises:
        ValueError: no label has a picture.
    """
    chosen = [label for label in range(scores.shape[1]) if relevant[:, label].any()]
    if not chosen:
        raise ValueError("no label has a picture")
    return float(np.mean([_average_precision(np.asarray(scores[:, one]), relevant[:, one]) for one in chosen]))


def _average_precision(scores: Floats, relevant: Truths) -> float:
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(relevant[order])
    # Equal scores are one step of the curve: it can be cut only where the score changes.
    cuts = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    recall = hits[cuts] / hits[-1]
    precision = hits[cuts] / (cuts + 1)
    # The best precision at this recall or any higher one.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    positions = np.searchsorted(recall, _RECALLS[:-1], side="left")
    return float((envelope[positions].sum() + 1.0) / len(_RECALLS))


def roc_auc(scores: Floats, relevant: Truths) -> float:
    """How often a relevant picture scores above another; equal scores count one half.

    Args:
        scores: (N,).
        relevant: (N,) bool.
    Raises:
        ValueError: all are relevant, or none.
    """
    positives = int(relevant.sum())
    negatives = len(relevant) - positives
    if not positives or not negatives:
        raise ValueError("all pictures are of one class")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of equal scores, the mean
    return float((ranks[inverse][relevant].sum() - positives * (positives + 1) / 2) / (positives * negatives))
