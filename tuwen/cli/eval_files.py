"""Evaluation files: `tuwen eval predict`, `score`, `submission` and `reverse`, as Chinese-CLIP's; CLIP_benchmark's."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table

from tuwen.cli.console import Json, progress_bar, stderr, stdout


class Way(StrEnum):
    """What asks, and what is asked for."""

    text_to_image = "text-to-image"
    image_to_text = "image-to-text"


class Index(StrEnum):
    """How the best are found."""

    exact = "exact"
    faiss = "faiss"
    faiss_ivf = "faiss-ivf"
    faiss_hnsw = "faiss-hnsw"


ImageFeatures = Annotated[Path, typer.Option("--image-features", help="*_imgs.img_feat.jsonl, or of `tuwen features`.")]
TextFeatures = Annotated[Path, typer.Option("--text-features", help="*_texts.txt_feat.jsonl, or of `tuwen features`.")]
Annotations = Annotated[Path, typer.Option("--annotations", help="{split}_texts.jsonl, or its .tr.jsonl.")]
Predictions = Annotated[Path, typer.Option("--predictions", help="What `tuwen eval predict` wrote.")]


def eval_predict(
    image_features: ImageFeatures,
    text_features: TextFeatures,
    out: Annotated[Path, typer.Option("--out", help="Prediction file to write.")],
    way: Annotated[Way, typer.Option("--direction", help="What asks, and what is asked for.")] = Way.text_to_image,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="A leaderboard takes 10.")] = 10,
    index: Annotated[Index, typer.Option("--index", help="faiss-ivf and faiss-hnsw are approximate.")] = Index.exact,
    probes: Annotated[int, typer.Option("--probes", min=1, help="What an approximate index looks at.")] = 32,
) -> None:
    """Top-k predictions of feature files, as make_topk_predictions of Chinese-CLIP."""
    from eval.chinese_clip_files import IMAGE_TO_TEXT, TEXT_TO_IMAGE
    from eval.faiss_search import FaissIndex, FaissKind
    from eval.predictions import predict

    direction = TEXT_TO_IMAGE if way is Way.text_to_image else IMAGE_TO_TEXT
    chosen = None if index is Index.exact else FaissIndex(cast(FaissKind, index.value), probes)
    with progress_bar("searching the gallery") as report:
        number = predict(image_features, text_features, direction, out, top_k, chosen, lambda done: report(done, 0))
    stdout.print(f"{out}: the {top_k} best for each of {number} queries", soft_wrap=True)


def eval_score(
    annotations: Annotations,
    predictions: Predictions,
    out: Annotated[Path | None, typer.Option("--out", help="Also as the file that evaluation.py writes.")] = None,
    as_json: Json = False,
) -> None:
    """Recall of predictions, as evaluation and evaluation_tr of Chinese-CLIP; the direction is the predictions'."""
    from eval.predictions import score, write_published_failure, write_published_json
    from tuwen.errors import InvalidInput

    try:
        recalls = score(annotations, predictions)
    except InvalidInput as error:
        if out is not None:
            write_published_failure(out, error)
        raise
    if out is not None:
        write_published_json(out, recalls)
    if as_json:
        print(json.dumps(asdict(recalls) | {"mean_recall": recalls.mean_recall}))
        return
    table = Table(title=str(predictions))
    for column in ("R@1", "R@5", "R@10", "mean", "queries"):
        table.add_column(column, justify="right")
    figures = (recalls.r1, recalls.r5, recalls.r10, recalls.mean_recall)
    table.add_row(*(f"{figure:.2%}" for figure in figures), str(recalls.num_queries))
    stdout.print(table)


def eval_submission(
    queries: Annotated[Path, typer.Option("--queries", help="test_texts.jsonl, whose answers are empty.")],
    predictions: Predictions,
) -> None:
    """Check predictions of a test split before they are uploaded, to MUGE's leaderboard say."""
    from eval.predictions import check_submission

    number = check_submission(queries, predictions)
    stdout.print(
        f"{predictions}: ten different answers for each of {number} queries; upload it as it is", soft_wrap=True
    )


def eval_reverse(
    annotations: Annotations,
    out: Annotated[Path | None, typer.Option("--out", help="Default: beside it, as .tr.jsonl.")] = None,
) -> None:
    """Annotations of the other direction, as transform_ir_annotation_to_tr of Chinese-CLIP."""
    from eval.chinese_clip_files import IMAGE_TO_TEXT, TEXT_TO_IMAGE, direction_of, read_answers, reverse, write_answers

    found = direction_of(annotations)
    wanted = IMAGE_TO_TEXT if found == TEXT_TO_IMAGE else TEXT_TO_IMAGE
    out = out or annotations.with_name(annotations.name.removesuffix(".jsonl") + ".tr.jsonl")
    reversed_answers = reverse(read_answers(annotations, found))
    if not reversed_answers:
        stderr.print(f"{annotations}: no query has an answer, as in a test split", soft_wrap=True)
    write_answers(out, wanted, reversed_answers.items())
    stdout.print(f"{out}: {len(reversed_answers)} queries", soft_wrap=True)


def eval_clip_benchmark_pairs(
    source: Annotated[Path, typer.Option("--source", help="Annotation file, or the folder of a webdataset.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of pairs to write into.")],
    images: Annotated[Path | None, typer.Option("--images", help="Folder of the pictures an annotation names.")] = None,
    split: Annotated[str, typer.Option("--split", help="Which split of a webdataset, and what to call it.")] = "test",
) -> None:
    """A retrieval set of CLIP_benchmark (flickr30k zh, xtd10 zh, ... or wds/) as TSV and JSONL."""
    from tuwen.data.clip_benchmark import write_clip_benchmark_pairs

    num_images, num_texts = write_clip_benchmark_pairs(source, images, out, split)
    stdout.print(f"{out}: split {split}, {num_images} pictures and {num_texts} texts", soft_wrap=True)


def eval_clip_benchmark_result(
    annotations: Annotations,
    image_features: ImageFeatures,
    text_features: TextFeatures,
    dataset: Annotated[str, typer.Option("--dataset", help="Name for the result, such as flickr30k.")],
    model: Annotated[str, typer.Option("--model", help="Name for the result, such as ViT-B-16.")],
    out: Annotated[Path, typer.Option("--out", help="JSON to write.")],
    pretrained: Annotated[str, typer.Option("--pretrained", help="Name of the weights, for the result.")] = "",
    language: Annotated[str, typer.Option("--language", help="Of the texts, for the result.")] = "zh",
    recall_k: Annotated[list[int] | None, typer.Option("--recall-k", min=1, help="Default: 1, 5 and 10.")] = None,
) -> None:
    """Retrieval of feature files in both directions, as CLIP_benchmark writes its results."""
    from eval.clip_benchmark import evaluate_features, write_result

    metrics = evaluate_features(annotations, image_features, text_features, tuple(recall_k or (1, 5, 10)))
    write_result(out, metrics, dataset, model, pretrained, language)
    stdout.print("\n".join(f"{name}  {value:.4f}" for name, value in metrics.items()))


def add_file_commands(app: typer.Typer) -> None:
    """Put them into `tuwen eval`."""
    for name, command in (
        ("predict", eval_predict),
        ("score", eval_score),
        ("submission", eval_submission),
        ("reverse", eval_reverse),
        ("clip-benchmark-pairs", eval_clip_benchmark_pairs),
        ("clip-benchmark-result", eval_clip_benchmark_result),
    ):
        app.command(name)(command)
