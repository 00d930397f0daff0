"""`tuwen eval zero-shot`: which of a set's labels a picture is closest to, without training on the set."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from tuwen.cli.console import DEFAULT_REPOSITORY, Json, Repository, Url, progress_bar, stderr, stdout
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
    from eval.class_folders import ClassFolders
    from eval.engine import Engine as OpenEngine
    from eval.prompts import Task
    from eval.submission import ModelSize
    from eval.zero_shot import ZeroShotResult
    from tuwen.scoring import Classifier

log = logging.getLogger(__name__)

_METRICS = {
    "accuracy": "top-1 accuracy",
    "mean_per_class": "mean per class accuracy",
    "map_11_points": "11-point mAP",
    "roc_auc": "ROC AUC",
}


def eval_zero_shot(
    data: Annotated[Path, typer.Option("--data", help="Folder of label_cn.txt and test/000, test/001 ...")],
    checkpoint: SomeCheckpoint = None,
    task_name: Annotated[
        str | None, typer.Option("--task", help="Whose prompts and metric; default: the folder's name.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Folder of the class folders below --data.")] = "test",
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Label file, one a line; default: label_cn.txt of --data.")
    ] = None,
    engine: Engine = EngineName.torch,
    device: Device = "cpu",
    repository: Repository = DEFAULT_REPOSITORY,
    model: Model = None,
    model_version: ModelVersion = None,
    url: Url = "localhost:8001",
    tls_ca: Authority = None,
    classifier_path: Annotated[
        Path | None, typer.Option("--classifier", help="Classifier to use instead of embedding the labels again.")
    ] = None,
    save_classifier: Annotated[
        Path | None, typer.Option("--save-classifier", help="Store the labels' embeddings, as a server reads them.")
    ] = None,
    submission: Annotated[
        Path | None, typer.Option("--submission", help="Write ELEVATER's prediction file to this path.")
    ] = None,
    report_path: Annotated[
        Path | None, typer.Option("--report", help="Write an HTML report with the confusion matrix to this file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Accuracy on pictures sorted into class folders, by the closest Chinese label; ours beside the published one."""
    from eval.class_folders import read_class_folders
    from eval.engines import open_engine
    from eval.submission import write_submission
    from eval.zero_shot import evaluate_zero_shot, submission_rows

    if engine is EngineName.torch and checkpoint is None:
        raise typer.BadParameter("--engine torch needs --checkpoint")
    if classifier_path and save_classifier:
        raise typer.BadParameter("--classifier and --save-classifier exclude each other")
    folders, task = read_class_folders(data, split, labels), _task(task_name, data)
    place = {"checkpoint": checkpoint, "repository": repository, "model": model, "version": model_version, "url": url}
    with open_engine(engine.value, **place, device=device, tls=tls_of(tls_ca)) as opened:  # type: ignore[arg-type]
        size = _size(opened, checkpoint) if submission else None
        classifier = _classifier(opened, folders, task, classifier_path, save_classifier)
        with progress_bar("embedding pictures") as report:
            result, scored = evaluate_zero_shot(opened, folders, task, classifier, bool(submission), report)
    if submission and size:
        name = f"Tuwen-{result.model_name}"
        count = write_submission(submission, name, task.name, size, submission_rows(folders, scored))
        stderr.print(f"{submission}: {count} pictures, {len(folders.labels)} probabilities each", soft_wrap=True)
    _show(result, task, data, report_path, as_json)


def _task(name: str | None, data: Path) -> Task:
    from eval.prompts import find_task, general_task, load_tasks
    from tuwen.errors import InvalidInput

    if name is not None:
        if task := find_task(name):
            return task
        raise InvalidInput(f"task {name!r} is unknown; known are {', '.join(load_tasks())}")
    folder = data.resolve().name
    if task := find_task(folder):
        return task
    log.info("%s is no known task: general prompts, accuracy; --task chooses one", folder)
    return general_task(folder)


def _size(engine: OpenEngine, checkpoint: Path | None) -> ModelSize:
    """A server does not tell its parameters: they are those of --checkpoint, or of the architecture of its name."""
    from eval.submission import ModelSize
    from tuwen.checkpoint import load_checkpoint
    from tuwen.specs import get_spec

    return ModelSize.of(load_checkpoint(checkpoint).spec if checkpoint else get_spec(engine.model_name))


def _classifier(
    engine: OpenEngine, data: ClassFolders, task: Task, stored: Path | None, store: Path | None
) -> Classifier:
    from eval.zero_shot import build_classifier
    from tuwen.scoring import load_classifier

    if stored:
        return load_classifier(stored)
    with progress_bar("embedding labels") as report:
        classifier = build_classifier(engine, data.labels, task.templates, report)
    if store:
        classifier.save(store)
        stderr.print(f"{store}: {len(data.labels)} labels, {len(task.templates)} prompts each", soft_wrap=True)
    return classifier


def _show(result: ZeroShotResult, task: Task, data: Path, report_path: Path | None, as_json: bool) -> None:
    from eval.published import published_model, published_zero_shot

    published = published_zero_shot(result.model_name, task.published) if task.published else None
    title = f"{result.title}: {result.model_name} on {data}"
    rows = [(_METRICS[result.metric], f"{result.score:.1%}", "" if published is None else f"{published:.1%}")]
    others = {
        "top-1 accuracy": result.top1,
        "top-5 accuracy": result.top5,
        _METRICS["mean_per_class"]: result.mean_per_class,
    }
    rows += [(name, f"{value:.1%}", "") for name, value in others.items() if value is not None and name != rows[0][0]]
    subtitle = (
        f"{result.num_images:,} pictures, {len(result.labels)} labels, {result.num_templates} prompts each; by "
        f"chance {1 / len(result.labels):.1%}; through {result.engine}"
    )
    if result.num_unreadable:
        stderr.print(f"{result.num_unreadable} pictures could not be read and are left out:", style="yellow")
        for line in result.unreadable:
            stderr.print(f"  {escape(line)}", soft_wrap=True)
    if report_path:
        from eval.report import write_zero_shot_report

        with stderr.status("drawing the report"):
            write_zero_shot_report(report_path, title, subtitle, result.labels, result.confusion_matrix(), rows)
        stderr.print(f"{report_path} shows what is taken for what", soft_wrap=True)
    if as_json:
        print(json.dumps(result.to_dict() | {"published": published}, ensure_ascii=False))
        return
    table = Table()
    table.add_column("")
    table.add_column("ours", justify="right")
    if published is not None:
        table.add_column(f"published {published_model(result.model_name)}", justify="right")
    for row in rows:
        table.add_row(*row[: len(table.columns)])
    # Above and below, not as title and caption, which are folded to the width of two narrow columns.
    stdout.print(escape(title), soft_wrap=True)
    stdout.print(table)
    stdout.print(escape(subtitle), soft_wrap=True)
