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
    from eval.published import PublishedRecall
    from eval.retrieval import Direction, DirectionScores, EmbeddedPairs, RetrievalResult
    from tuwen.data.pairs import PairSet

eval_app = typer.Typer(help="Measure a checkpoint, its ONNX files or a live server.", no_args_is_help=True)

Split = Annotated[str, typer.Option("--split", help="Which split of the data.")]
_WAYS: dict[str, Direction] = {"text to image": "text_to_image", "image to text": "image_to_text"}


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
    features: Annotated[
        Path | None,
        typer.Option("--features", help="Score what `tuwen features` wrote to this folder; nothing is embedded."),
    ] = None,
    report_path: Annotated[
        Path | None, typer.Option("--report", help="Write an HTML report with the worst retrievals to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """R@1, R@5, R@10, their mean and the ranks, text to image and image to text."""
    from eval.engines import open_engine
    from eval.retrieval import evaluate_retrieval
    from tuwen.data.pairs import open_pairs

    if features is not None:
        from eval.stored_features import score_features

        pairs = open_pairs(data, split)
        _show(*score_features(features, pairs, str(data), split), pairs, report_path, as_json)
        return
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
    from eval.retrieval import published_beside

    published = published_beside(result)
    if report_path is not None:
        from eval.report import write_retrieval_report

        with stderr.status("drawing the report"):
            write_retrieval_report(report_path, result, embedded, pairs, published)
        stderr.print(f"{report_path} shows the worst retrievals", soft_wrap=True)
    if as_json:
        print(json.dumps(result.to_json(), ensure_ascii=False))
        return
    title = f"{result.architecture} on {result.data} ({result.split}, {result.num_images} pictures)"
    table = _table(escape(title), "R@1", "R@5", "R@10", "mean", "median rank", "mean rank", "queries")
    for name, way in _WAYS.items():
        scores = getattr(result, way)
        ranks = (f"{scores.median_rank:g}", f"{scores.mean_rank:.1f}")
        table.add_row(name, *_percents(scores), *ranks, str(scores.num_queries))
        for row, recalls in published.items():
            if way in recalls:
                table.add_row(f"[dim]{row}[/dim]", *_percents(recalls[way]))
    stdout.print(table)


def _print_comparison(comparison: Comparison, one: str, other: str) -> None:
    stdout.print(escape(f"first   {one}\nsecond  {other}"), soft_wrap=True, highlight=False)
    cosines = _table("cosine of the first's embeddings with the second's", "worst", "1 %", "5 %", "median", "mean")
    cosines.add_row("pictures", *_spread(comparison.image_cosine))
    cosines.add_row("texts", *_spread(comparison.text_cosine))
    stdout.print(cosines)
    answers = _table("answers", "first", "second", "difference")
    for name, way in _WAYS.items():
        answers.add_section()
        first, second, difference = (getattr(each, way) for each in (comparison.one, comparison.other, comparison))
        change = difference.differences
        for metric, label in (("r1", "R@1"), ("r5", "R@5"), ("r10", "R@10"), ("mean_recall", "mean recall")):
            values = (f"{getattr(each, metric):.2%}" for each in (first, second))
            answers.add_row(f"{name}, {label}", *values, f"{100 * change[metric]:+.2f}")
        ranks = (f"{each.mean_rank:.2f}" for each in (first, second))
        answers.add_row(f"{name}, mean rank", *ranks, f"{change['mean_rank']:+.2f}")
        same = (
            ("best of all", difference.same_top_1),
            ("ten best", difference.same_top_10),
            ("rank of the right one", difference.same_rank),
        )
        for label, share in same:
            answers.add_row(f"{name}, same {label}", "", f"{share:.2%}", "")
    stdout.print(answers)


def _table(title: str, *columns: str) -> Table:
    """A column of words, then figures."""
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _percents(scores: DirectionScores | PublishedRecall) -> list[str]:
    return [f"{value:.1%}" for value in (scores.r1, scores.r5, scores.r10, scores.mean_recall)]


def _spread(cosines: CosineSpread) -> list[str]:
    return [f"{value:.6f}" for value in (cosines.min, cosines.p1, cosines.p5, cosines.median, cosines.mean)]
