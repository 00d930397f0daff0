"""`tuwen eval ...`: what a checkpoint, its ONNX files or a live server is worth, and whether two are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tuwen.cli.console import DEFAULT_REPOSITORY, Data, Json, Repository, Url, progress_bar, stderr, stdout
from tuwen.cli.engine_options import (
    Authority,
    Device,
    Engine,
    EngineName,
    Model,
    ModelVersion,
    SomeCheckpoint,
    tls_of,
)

if TYPE_CHECKING:
    from eval.compare import Comparison, CosineSpread
    from eval.retrieval import EmbeddedPairs, RetrievalResult
    from tuwen.data.pairs import PairSet

eval_app = typer.Typer(help="Measure a checkpoint, its ONNX files or a live server.", no_args_is_help=True)

Split = Annotated[str, typer.Option("--split", help="Which split of the data.")]
_WAYS = ("text_to_image", "image_to_text")


@eval_app.command("retrieval")
def eval_retrieval(
    data: Data,
    checkpoint: SomeCheckpoint = None,
    split: Split = "valid",
    engine: Engine = EngineName.torch,
    device: Device = "cpu",
    repository: Repository = DEFAULT_REPOSITORY,
    model: Model = None,
    model_version: ModelVersion = None,
    url: Url = "localhost:8001",
    tls_ca: Authority = None,
    report_path: Annotated[
        Path | None, typer.Option("--report", help="Write an HTML report with the worst retrievals to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """R@1, R@5, R@10, their mean and the ranks, text to image and image to text."""
    from eval.engines import open_engine
    from eval.retrieval import evaluate_retrieval
    from tuwen.data.pairs import open_pairs

    if engine is EngineName.torch and checkpoint is None:
        raise typer.BadParameter("--engine torch needs --checkpoint")
    place = {"checkpoint": checkpoint, "repository": repository, "model": model, "version": model_version, "url": url}
    with open_engine(engine.value, **place, device=device, tls=tls_of(tls_ca)) as opened:  # type: ignore[arg-type]
        pairs = open_pairs(data, split)
        with progress_bar("embedding") as report:
            result, embedded = evaluate_retrieval(opened, pairs, str(data), split, report)
    _show(result, embedded, pairs, report_path, as_json)


@eval_app.command("compare")
def eval_compare(
    one: Annotated[str, typer.Argument(metavar="ENGINE", help="What is trusted, as torch:samples/emoji_tiny.")],
    other: Annotated[
        str,
        typer.Argument(metavar="OTHER", help="What is judged: onnx:REPOSITORY/NAME@VERSION, triton:HOST:PORT/NAME."),
    ],
    data: Data,
    split: Split = "valid",
    min_cosine: Annotated[
        float, typer.Option("--min-cosine", help="Least cosine between the two embeddings of any item.")
    ] = 0.999,
    max_recall_difference: Annotated[
        float, typer.Option("--max-recall-difference", help="Largest change of R@1, R@5 or R@10, as a fraction.")
    ] = 0.005,
    device: Device = "cpu",
    tls_ca: Authority = None,
    as_json: Json = False,
) -> None:
    """Whether two engines embed alike and find alike; exit 1 where they do not: the acceptance test of a deployment."""
    from eval.compare import check_agreement, compare
    from eval.engines import open_engine_at
    from eval.retrieval import evaluate_retrieval
    from tuwen.data.pairs import open_pairs

    tls = tls_of(tls_ca)
    with open_engine_at(one, device, tls=tls) as first, open_engine_at(other, device, tls=tls) as second:
        pairs = open_pairs(data, split)
        evaluated = []
        for place, engine in ((one, first), (other, second)):
            with progress_bar(place) as report:
                evaluated.append(evaluate_retrieval(engine, pairs, str(data), split, report))
    comparison = compare(*evaluated)
    if as_json:
        print(json.dumps(comparison.to_json(), ensure_ascii=False))
    else:
        _print_comparison(comparison, one, other)
    if not comparison.is_same_model:
        stderr.print(
            f"[yellow]warning:[/yellow] fingerprints differ, {comparison.one.fingerprint} and "
            f"{comparison.other.fingerprint}: do not search the vectors of one with those of the other",
            soft_wrap=True,
        )
    check_agreement(comparison, min_cosine, max_recall_difference)


def _show(
    result: RetrievalResult, embedded: EmbeddedPairs, pairs: PairSet, report_path: Path | None, as_json: bool
) -> None:
    if report_path is not None:
        from eval.report import write_retrieval_report

        with stderr.status("drawing the report"):
            write_retrieval_report(report_path, result, embedded, pairs)
        stderr.print(f"{report_path} shows the worst retrievals", soft_wrap=True)
    if as_json:
        print(json.dumps(result.to_json(), ensure_ascii=False))
        return
    title = f"{result.architecture} on {result.data} ({result.split}, {result.num_images} pictures)"
    table = Table(title=escape(title))
    for column in ("", "R@1", "R@5", "R@10", "mean", "median rank", "mean rank", "queries"):
        table.add_column(column, justify="right" if column else "left")
    for way, scores in zip(_WAYS, (result.text_to_image, result.image_to_text), strict=True):
        percents = (f"{value:.1%}" for value in (scores.r1, scores.r5, scores.r10, scores.mean_recall))
        ranks = (f"{scores.median_rank:g}", f"{scores.mean_rank:.1f}")
        table.add_row(way.replace("_", " "), *percents, *ranks, str(scores.num_queries))
    stdout.print(table)


def _print_comparison(comparison: Comparison, one: str, other: str) -> None:
    cosines = Table(title=escape(f"Cosine of {one} with {other}"))
    for column in ("", "worst", "1 %", "5 %", "median", "mean"):
        cosines.add_column(column, justify="right" if column else "left")
    cosines.add_row("pictures", *_spread(comparison.image_cosine))
    cosines.add_row("texts", *_spread(comparison.text_cosine))
    stdout.print(cosines)
    answers = Table(title="Answers")
    for column in ("", "R@1", "R@5", "R@10", "mean rank", "same top 1", "same top 10", "same rank"):
        answers.add_column(column, justify="right" if column else "left")
    for way, first, second, difference in (
        ("text to image", comparison.one.text_to_image, comparison.other.text_to_image, comparison.text_to_image),
        ("image to text", comparison.one.image_to_text, comparison.other.image_to_text, comparison.image_to_text),
    ):
        agreement = (difference.same_top_1, difference.same_top_10, difference.same_rank)
        for name, scores, more in ((one, first, ("", "", "")), (other, second, tuple(f"{x:.2%}" for x in agreement))):
            figures = (f"{scores.r1:.2%}", f"{scores.r5:.2%}", f"{scores.r10:.2%}", f"{scores.mean_rank:.2f}")
            answers.add_row(escape(f"{way}, {name}"), *figures, *more)
    stdout.print(answers)


def _spread(cosines: CosineSpread) -> list[str]:
    return [f"{value:.6f}" for value in (cosines.min, cosines.p1, cosines.p5, cosines.median, cosines.mean)]
