"""CLIP_benchmark's result of a retrieval task: feature files and annotations in, its JSON out.

    {"dataset": "flickr30k", "model": "ViT-B-16", "pretrained": "...", "task": "zeroshot_retrieval",
     "metrics": {"image_retrieval_recall@5": 0.87, "text_retrieval_recall@5": 0.93}, "language": "zh"}

Image retrieval is text to image, text retrieval image to text; recalls are fractions. Its `build` gathers such files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.chinese_clip_files import TEXT_TO_IMAGE, Features, read_annotations, reverse
from eval.read_features import demand_one_model, read_stored
from tuwen.errors import InvalidInput
from tuwen.files import write_text
from tuwen.retrieval import first_relevant_ranks, recalls_of_ranks

RETRIEVAL_TASK = "zeroshot_retrieval"


def evaluate_features(
    annotations: Path, image_features: Path, text_features: Path, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recalls of both directions by its names, `image_retrieval_recall@5` and so on, as fractions.

    Pictures without a text are in the gallery but ask nothing, texts without a picture take no part.

    Raises:
        InvalidInput: a file is malformed, an annotated item has no feature, or a k is above the number of items.
    """
    images_of_text = {text: items for text, items in read_annotations(annotations, TEXT_TO_IMAGE).items() if items}
    if not images_of_text:
        raise InvalidInput(f"{annotations}: no query has an answer, as in a test split; there is nothing to score")
    demand_one_model(image_features, text_features)
    images, texts = read_stored(image_features, "image"), read_stored(text_features, "text")
    if images.embeds.shape[1] != texts.embeds.shape[1]:
        raise InvalidInput(
            f"{text_features}: D is {texts.embeds.shape[1]}, {image_features} has {images.embeds.shape[1]}"
        )
    row_of_image = {int(image): row for row, image in enumerate(images.ids)}
    rows = _rows_of(images_of_text, texts, "text", text_features)
    texts = Features(texts.ids[rows], texts.embeds[rows])
    texts_of_image = reverse(images_of_text)
    asking = _rows_of(texts_of_image, images, "image", image_features)
    row_of_text = {text: row for row, text in enumerate(images_of_text)}
    forth = [[row_of_image[image] for image in items] for items in images_of_text.values()]
    back = [[row_of_text[text] for text in items] for items in texts_of_image.values()]
    metrics: dict[str, float] = {}
    for name, queries, items, relevant in (
        ("image", texts.embeds, images.embeds, forth),
        ("text", images.embeds[asking], texts.embeds, back),
    ):
        try:
            recalls = recalls_of_ranks(first_relevant_ranks(queries, items, relevant), len(items), ks)
        except ValueError as error:
            raise InvalidInput(f"{name} retrieval: {error}") from None
        metrics |= {f"{name}_retrieval_recall@{k}": recall for k, recall in zip(ks, recalls, strict=True)}
    return metrics


def write_result(
    path: Path, metrics: Mapping[str, float], dataset: str, model: str, pretrained: str, language: str = "zh"
) -> None:
    """Write a result, atomically."""
    result = {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": RETRIEVAL_TASK,
        "metrics": dict(metrics),
        "language": language,
    }
    write_text(path, json.dumps(result))


def _rows_of(wanted: Mapping[int, object], features: Features, kind: str, path: Path) -> list[int]:
    row_of = {int(one): row for row, one in enumerate(features.ids)}
    if missing := [one for one in wanted if one not in row_of]:
        raise InvalidInput(
            f"{path}: {len(missing)} annotated {kind}s have no feature, {kind}_id {missing[0]} the first"
        )
    return [row_of[one] for one in wanted]
