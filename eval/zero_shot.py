"""Zero-shot classification: pictures in class folders, and Chinese labels, through any Engine.

    tuwen eval zero-shot --data data/zero_shot/digits --checkpoint samples/emoji_tiny

Each label is asked in many wordings, whose embeddings are averaged (Chinese-CLIP's prompt ensembling); a picture is
of the label whose embedding is closest. Memory does not grow with the pictures: they are scored as they are embedded,
and what must be kept of every picture and label lies in a file.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.class_folders import ClassFolders, Pictures
from eval.classification_metrics import map_11_points, mean_per_class, roc_auc
from eval.engine import Engine, EngineKind, Row, Unusable
from eval.prompts import Metric, Task
from tuwen.errors import InvalidInput
from tuwen.retrieval import first_relevant_rank
from tuwen.scoring import Classifier, average_prompts, fill_templates, softmax

Matrix = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

# Chinese-CLIP's zeroshot_evaluation.py multiplies cosines by it; exp(logit_scale) of all released models.
LOGIT_SCALE = 100.0
_BLOCK = 256
_MAX_EXAMPLES = 10


def build_classifier(
    engine: Engine,
    labels: Sequence[str],
    templates: Sequence[str],
    on_progress: Progress = lambda done, total: None,
) -> Classifier:
    """Embed every label in every wording and average; a label that is there twice is embedded once.

    Raises:
        InvalidInput: as `fill_templates`; or a prompt cannot be embedded.
    """
    distinct = list(dict.fromkeys(labels))
    prompts = fill_templates(distinct, templates)
    rows: list[Row] = []
    for prompt, row in zip(prompts, engine.embed_texts(prompts), strict=True):
        if isinstance(row, Unusable):
            raise InvalidInput(f"prompt {prompt[:40]!r}: {row}")
        rows.append(row)
        on_progress(len(rows), len(prompts))
    averaged = average_prompts(np.stack(rows), len(distinct))
    position = {label: number for number, label in enumerate(distinct)}
    text_embeds = averaged[[position[label] for label in labels]]
    return Classifier(tuple(labels), text_embeds, engine.fingerprint, tuple(templates))


def check_classifier(classifier: Classifier, engine: Engine, data: ClassFolders) -> None:
    """That a stored classifier is this model's and this set's.

    Raises:
        InvalidInput: it is not; what differs is named.
    """
    if classifier.fingerprint != engine.fingerprint:
        raise InvalidInput(
            f"the classifier was made with model {classifier.fingerprint}, this one is {engine.fingerprint}; make it "
            "again with --save-classifier"
        )
    if classifier.labels != data.labels:
        raise InvalidInput(
            f"the classifier has {len(classifier.labels)} labels, the data {len(data.labels)}; they must be the same, "
            "in the same order"
        )


@dataclass(frozen=True)
class Scored:
    """What is known of every picture; N of them, in the order of `pictures`.

    Attributes:
        predicted: int64 (N,), the closest label; -1 of a picture that could not be read.
        rank: int64 (N,), how many labels are closer than its own, or than the closest of its own.
        probs: float32 (N, L), in a file; None unless asked for. Of an unreadable picture all are 1 / L.
        unreadable: file -> reason.
    """

    pictures: Pictures
    predicted: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    probs: Matrix | None
    unreadable: dict[str, str]

    @property
    def is_read(self) -> npt.NDArray[np.bool_]:
        return self.predicted >= 0


def score_pictures(
    engine: Engine,
    data: ClassFolders,
    classifier: Classifier,
    is_multi_label: bool = False,
    keep_probs: bool = False,
    on_progress: Progress = lambda done, total: None,
) -> Scored:
    """Embed all pictures and compare them with the labels."""
    pictures = data.pictures(is_multi_label)
    total, num_labels = len(pictures.files), len(classifier.labels)
    predicted, rank = np.full(total, -1, np.int64), np.full(total, num_labels, np.int64)
    probs = _matrix_in_a_file(total, num_labels) if keep_probs else None
    unreadable: dict[str, str] = {}
    rows = engine.embed_images(_read(data.root, file) for file in pictures.files)
    for start in range(0, total, _BLOCK):
        block = range(start, min(start + _BLOCK, total))
        positions, embeds = [], []
        for position, row in zip(block, islice(rows, _BLOCK), strict=True):
            if isinstance(row, Unusable):
                unreadable[pictures.files[position]] = str(row)
            else:
                positions.append(position)
                embeds.append(row)
        if probs is not None:
            probs[block.start : block.stop] = 1 / num_labels
        if positions:
            logits = LOGIT_SCALE * (np.stack(embeds) @ classifier.text_embeds.T)
            predicted[positions] = logits.argmax(axis=1)
            rank[positions] = first_relevant_rank(logits, _relevant(pictures, positions, num_labels))
            if probs is not None:
                probs[positions] = softmax(logits)
        on_progress(block.stop, total)
    return Scored(pictures, predicted, rank, probs, unreadable)


def _matrix_in_a_file(rows: int, columns: int) -> Matrix:
    with tempfile.TemporaryFile() as file:  # the map holds on to it; it is gone with the map
        return np.memmap(file, np.float32, mode="w+", shape=(rows, columns))


def _read(root: Path, file: str) -> bytes:
    try:
        return (root / file).read_bytes()
    except OSError:
        return b""  # the engine finds no picture in it, and says so in its place


def _relevant(pictures: Pictures, positions: Iterable[int], num_labels: int) -> npt.NDArray[np.bool_]:
    rows = [pictures.labels_of[position] for position in positions]
    relevant = np.zeros((len(rows), num_labels), np.bool_)
    for row, labels in enumerate(rows):
        relevant[row, list(labels)] = True
    return relevant


@dataclass(frozen=True)
class ZeroShotResult:
    """Figures of one model on one task, as fractions, over the pictures that could be read.

    Attributes:
        score: by the task's own metric.
        top5: None where there are at most five labels.
        confusion: (label, predicted label, count), of those that occurred. A picture of several labels counts under
            the predicted one if it has it, else under its first.
        unreadable: the first few, as `file: reason`.
    """

    task: str
    title: str
    model_name: str
    engine: EngineKind
    fingerprint: int
    metric: Metric
    score: float
    top1: float
    top5: float | None
    mean_per_class: float
    num_images: int
    num_unreadable: int
    num_templates: int
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, int, int], ...]
    unreadable: tuple[str, ...]

    def confusion_matrix(self) -> npt.NDArray[np.int64]:
        """(L, L) counts: a row a label, a column what was predicted."""
        matrix = np.zeros((len(self.labels), len(self.labels)), np.int64)
        for label, predicted, count in self.confusion:
            matrix[label, predicted] = count
        return matrix

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_zero_shot(
    engine: Engine,
    data: ClassFolders,
    task: Task,
    classifier: Classifier,
    keep_probs: bool = False,
    on_progress: Progress = lambda done, total: None,
) -> tuple[ZeroShotResult, Scored]:
    """The figures, and what they were made of; `keep_probs` if a submission is to be written of it.

    Raises:
        InvalidInput: the classifier is not this model's or this set's, no picture could be read, or a task between two
            classes has other labels.
    """
    check_classifier(classifier, engine, data)
    if task.metric == "roc_auc" and len(data.labels) != 2:
        raise InvalidInput(f"{task.name}: {len(data.labels)} labels; ROC AUC is between two")
    keep_probs = keep_probs or task.metric in ("map_11_points", "roc_auc")
    scored = score_pictures(engine, data, classifier, task.is_multi_label, keep_probs, on_progress)
    if not scored.is_read.any():
        file, reason = next(iter(scored.unreadable.items()))
        raise InvalidInput(f"{data.root}: none of {len(scored.predicted)} pictures can be read; {file}: {reason}")
    return _summarise(engine, data, task, classifier, scored), scored


def _summarise(
    engine: Engine, data: ClassFolders, task: Task, classifier: Classifier, scored: Scored
) -> ZeroShotResult:
    rank, predicted = scored.rank[scored.is_read], scored.predicted[scored.is_read]
    # The label that stands for a picture of several: the predicted one if it has it, else its first.
    labels_of = (scored.pictures.labels_of[position] for position in np.flatnonzero(scored.is_read))
    truth = np.array([int(one) if one in own else own[0] for one, own in zip(predicted, labels_of, strict=True)])
    per_class = mean_per_class(predicted, truth)
    top1 = float((rank == 0).mean())
    if task.metric == "accuracy":
        score = top1
    elif task.metric == "mean_per_class":
        score = per_class
    else:
        score = _score_of_probs(task.metric, scored, len(data.labels))
    confusion = Counter(zip(truth.tolist(), predicted.tolist(), strict=True))
    return ZeroShotResult(
        task=task.name,
        title=task.title,
        model_name=engine.model_name,
        engine=engine.kind,
        fingerprint=engine.fingerprint,
        metric=task.metric,
        score=score,
        top1=top1,
        top5=float((rank < 5).mean()) if len(data.labels) > 5 else None,
        mean_per_class=per_class,
        num_images=len(rank),
        num_unreadable=len(scored.unreadable),
        num_templates=len(classifier.templates),
        labels=data.labels,
        confusion=tuple((label, one, count) for (label, one), count in sorted(confusion.items())),
        unreadable=tuple(f"{file}: {reason}" for file, reason in islice(scored.unreadable.items(), _MAX_EXAMPLES)),
    )


def _score_of_probs(metric: Metric, scored: Scored, num_labels: int) -> float:
    assert scored.probs is not None  # kept for these metrics
    read = np.flatnonzero(scored.is_read)
    relevant = _relevant(scored.pictures, read, num_labels)
    if metric == "map_11_points":
        return map_11_points(scored.probs[read], relevant)
    try:
        return roc_auc(scored.probs[read, 1], relevant[:, 1])
    except ValueError as error:
        raise InvalidInput(f"{metric}: {error}") from error


def submission_rows(data: ClassFolders, scored: Scored) -> Iterator[Matrix]:
    """The probabilities (L,) of each file, in index.json's order, or in that of the folders.

    Raises:
        InvalidInput: the probabilities were not kept.
    """
    if scored.probs is None:
        raise InvalidInput("the probabilities were not kept")
    positions = scored.pictures.picture_of_file
    for picture in positions if data.index is None else positions[data.index]:
        yield scored.probs[picture]
