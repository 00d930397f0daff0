"""The README.md that a run leaves in its checkpoint folder: what the weights are, from what, and how good.

Nothing in it tells whose machine it was: of a path outside the working folder only the end is kept.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from training.metrics import ValidationRecord
from training.recipe import Recipe
from tuwen.embed import RetrievalScores

_CARD = """# {title}

A Chinese-CLIP, images and Chinese text in one embedding space, trained with Tuwen.

{facts}{validation}
## Use

{fence}
{commands}{fence}

## Recipe

{fence}toml
{recipe}{fence}

## Licence

Not chosen yet: whoever publishes these weights names one here that the training data and the first weights allow.
"""


@dataclass(frozen=True)
class RunSummary:
    """A run so far, of which the checkpoint holds the weights after `step`.

    Attributes:
        epoch: from 1.
        loss: of late, a mean.
        elapsed_s: of training, all starts together.
        samples_per_s: of all processes together.
        device_name: as `cpu` or the GPU's name.
        validation: of these weights; None where there was none.
        is_best: these are the weights of the best validation, and not the last ones.
    """

    step: int
    num_steps: int
    epoch: int
    loss: float
    elapsed_s: float
    samples_per_s: float
    num_processes: int
    device_name: str
    validation: ValidationRecord | None = None
    is_best: bool = False


def render_model_card(recipe: Recipe, summary: RunSummary) -> str:
    """Markdown. What comes from the recipe or a path is escaped, so that it shows as it is."""
    commands, toml = _commands(recipe, summary), recipe_as_toml(recipe)
    card = _CARD.format(
        title=f"{escape(recipe.model.architecture)}: {escape(recipe.run.out.name)}",
        facts=_table(("", ""), _facts(recipe, summary)),
        validation=_validation(summary.validation),
        commands=commands,
        recipe=toml,
        fence=_fence(commands + toml),
    )
    # A file name that is no Unicode must not cost the run its result.
    return card.encode("utf-8", "replace").decode()


def _facts(recipe: Recipe, summary: RunSummary) -> list[tuple[str, str]]:
    optim = recipe.optim
    last = "best validation" if summary.is_best else "last step"
    # The best may lie in the middle of a run that is finished.
    end = "" if summary.is_best or summary.step >= summary.num_steps else ", not finished"
    averaged = f"; a moving average of the weights, decay {optim.ema_decay:g}" if optim.ema_decay else ""
    return [
        ("weights", f"of the {last}, {summary.step} of {summary.num_steps}{end}{averaged}"),
        ("started from", _started_from(recipe)),
        ("data", _data(recipe)),
        *(("teacher", escape(_shown_path(path))) for path in (recipe.distill.teacher, recipe.distill.features) if path),
        ("epoch", str(summary.epoch)),
        ("pictures a step", str(optim.batch_size)),
        ("learning rate", f"{recipe.lr:g}, {optim.schedule}, after {optim.warmup_steps} steps of warm-up"),
        ("loss", f"{recipe.loss.kind}, {summary.loss:.4f}"),
        ("time", str(timedelta(seconds=round(summary.elapsed_s)))),
        ("throughput", f"{summary.samples_per_s:.0f} pictures/s"),
        ("processes", f"{summary.num_processes} on {escape(summary.device_name)}, {recipe.engine.precision}"),
        ("versions", f"tuwen {_tuwen_version()}, torch {torch.__version__}"),
    ]


def _started_from(recipe: Recipe) -> str:
    model = recipe.model
    if model.init_checkpoint:
        return escape(_shown_path(model.init_checkpoint))
    towers = (("image", model.init_vision), ("text", model.init_text))
    return ", ".join(f"{name} tower: {escape(_shown_path(path)) if path else 'random'}" for name, path in towers)


def _data(recipe: Recipe) -> str:
    if recipe.data.shards:
        return escape(_shown_path(Path(recipe.data.shards)))
    shown = [_shown_path(source.path) for source in recipe.data.all_sources]
    return f"{escape(', '.join(shown))}, split {escape(recipe.data.train_split)}"


def _validation(record: ValidationRecord | None) -> str:
    if record is None:
        return ""
    rows = [
        (name, *(f"{value:.1%}" for value in (scores.r1, scores.r5, scores.r10, scores.mean_recall)), _queries(scores))
        for name, scores in (("text to image", record.text_to_image), ("image to text", record.image_to_text))
    ]
    table = _table((f"step {record.step}", "R@1", "R@5", "R@10", "mean", "queries"), rows)
    mean = f"Mean recall of both directions: {record.mean_recall:.1%}."
    if record.zero_shot_accuracy is not None:
        mean += f" Zero-shot accuracy: {record.zero_shot_accuracy:.1%}."
    return f"\n## Validation\n\n{table}\n{mean}\n"


def _queries(scores: RetrievalScores) -> str:
    return str(scores.num_queries)


def _commands(recipe: Recipe, summary: RunSummary) -> str:
    """What to do with the folder, a command a line, as a shell takes it."""
    checkpoint = f"--checkpoint {shlex.quote(_shown_path(recipe.run.out))}"
    lines = [f"tuwen build {checkpoint}"]
    if recipe.valid_path and summary.validation:
        data = f"--data {shlex.quote(_shown_path(recipe.valid_path))}"
        lines.append(f"tuwen eval retrieval {checkpoint} {data} --split {shlex.quote(recipe.valid.split)}")
    return "".join(line + "\n" for line in lines)


def _tuwen_version() -> str:
    try:
        return version("tuwen")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "from a checkout"


# --- Markdown ---------------------------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Shown as it is, in one line: no emphasis, code, link, HTML or table cell is made of it."""
    return re.sub(r"([\\`*_\[\]<>|~&#$!])", r"\\\1", " ".join(text.split()))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _fence(block: str) -> str:
    """Longer than any run of backticks in it."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block)), default=0))


# --- paths and the recipe -----------------------------------------------------------------------------------------


def _shown_path(path: Path) -> str:
    """Relative to the working folder, or the last two parts of what lies outside it."""
    resolved = Path(os.path.normpath(Path.cwd() / path))
    if resolved.is_relative_to(Path.cwd()):
        return str(resolved.relative_to(Path.cwd()))
    return "/".join(["…", *resolved.parts[1:][-2:]])


def recipe_as_toml(recipe: Recipe) -> str:
    """What the recipe sets, section by section, with paths as in the card; what is as by default is left out."""
    lines: list[str] = []
    for section, values in recipe.model_dump(exclude_defaults=True, exclude_none=True).items():
        if values:
            lines += [f"[{section}]", *(f"{key} = {_toml(_public(key, value))}" for key, value in values.items()), ""]
    return "\n".join(lines)


def _public(key: str, value: object) -> object:
    """A recipe's value with its paths shortened."""
    if isinstance(value, Path) or key == "shards":
        return _shown_path(Path(str(value)))
    if isinstance(value, Mapping):
        return {inner: _public(inner, one) for inner, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_public("", one) for one in value]
    return value


def _toml(value: Any) -> str:
    """A TOML value; JSON's strings, numbers and lists are such."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return json.dumps(value, ensure_ascii=False)
