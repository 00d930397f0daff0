"""The figures against scikit-learn, and against ELEVATER's own way of counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.classification_metrics import map_11_points, mean_per_class, roc_auc

metrics = pytest.importorskip("sklearn.metrics")
SEEDS = st.integers(0, 2**32 - 1)


def published_average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """As vision-evaluation, ELEVATER's metrics, has it: the best precision at each of 11 recalls or a higher one."""
    precision, recall, _ = metrics.precision_recall_curve(relevant, scores)
    return float(np.mean([precision[recall >= threshold].max() for threshold in np.linspace(1, 0, 11)]))


@given(SEEDS, st.integers(1, 40), st.integers(1, 6), st.sampled_from([2, 5, 1000]))
@settings(max_examples=60, deadline=None)
def test_map_is_elevaters(seed: int, num_pictures: int, num_labels: int, num_levels: int) -> None:
    """Ties too: two levels of score are nearly all ties. And in per cent steps, where recalls meet the thresholds."""
    random = np.random.default_rng(seed)
    scores = random.integers(0, num_levels, (num_pictures, num_labels)) / num_levels
    relevant = random.random((num_pictures, num_labels)) < 0.4
    relevant[0, 0] = True
    expected = [
        published_average_precision(scores[:, label], relevant[:, label])
        for label in range(num_labels)
        if relevant[:, label].any()
    ]
    assert map_11_points(scores, relevant) == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize("num_relevant", [10, 20, 30])
def test_recalls_that_meet_the_thresholds(num_relevant: int) -> None:
    """Tenths are not exact in binary; which side they fall on must be the evaluator's."""
    random = np.random.default_rng(num_relevant)
    for _ in range(50):
        scores, relevant = random.permutation(60) / 60, np.arange(60) < num_relevant
        assert map_11_points(scores[:, None], relevant[:, None]) == pytest.approx(
            published_average_precision(scores, relevant), abs=1e-12
        )


def test_map_by_hand() -> None:
    """Relevant at ranks 1 and 4: precision 1 up to recall 0.5, then 2/4."""
    relevant = np.array([[1], [0], [0], [1]], bool)
    assert map_11_points(np.array([[4.0], [3], [2], [1]]), relevant) == pytest.approx((6 * 1 + 5 * 0.5) / 11)
    # The relevant one is last, and still precision at recall 0 is 1: the curve begins there.
    assert map_11_points(np.array([[1.0], [2]]), np.array([[True], [False]])) == pytest.approx((10 * 0.5 + 1) / 11)
    with pytest.raises(ValueError, match="no label has a picture"):
        map_11_points(np.zeros((2, 3)), np.zeros((2, 3), bool))


@given(SEEDS, st.integers(1, 60), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_mean_per_class_is_balanced_accuracy(seed: int, num_pictures: int, num_labels: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.integers(0, num_labels, num_pictures)
    predicted = np.where(random.random(num_pictures) < 0.5, truth, random.choice(truth, num_pictures))
    assert mean_per_class(predicted, truth) == pytest.approx(metrics.balanced_accuracy_score(truth, predicted))


def test_a_rare_class_weighs_as_much() -> None:
    truth = np.array([0] * 9 + [1])
    assert mean_per_class(np.zeros(10, np.int64), truth) == 0.5
    assert mean_per_class(np.full(10, 7), truth) == 0
    with pytest.raises(ValueError, match="no pictures"):
        mean_per_class(np.zeros(0, np.int64), np.zeros(0, np.int64))


@given(SEEDS, st.integers(2, 50), st.sampled_from([2, 3, 1000]))
@settings(max_examples=40, deadline=None)
def test_roc_auc_is_scikit_learns(seed: int, num_pictures: int, num_levels: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(0, num_levels, num_pictures) / num_levels
    relevant = random.random(num_pictures) < 0.5
    relevant[:2] = True, False
    assert roc_auc(scores, relevant) == pytest.approx(metrics.roc_auc_score(relevant, scores))


def test_roc_auc_needs_both_kinds() -> None:
    with pytest.raises(ValueError, match="one class"):
        roc_auc(np.zeros(3), np.ones(3, bool))
