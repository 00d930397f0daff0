"""The zero-shot tasks: what each is asked with and measured by, read from prompts.toml beside this file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from tuwen.errors import InvalidInput

PROMPTS_PATH = Path(__file__).with_name("prompts.toml")
# Of a folder that is no known task: a general question, and how often the first answer is right.
_GENERAL = "general"

Metric = Literal["accuracy", "mean_per_class", "map_11_points", "roc_auc"]


@dataclass(frozen=True)
class Task:
    """One zero-shot task.

    Attributes:
        metric: which of the figures is this task's score.
        published: its column in the published table; None where there is none.
    """

    name: str
    title: str
    metric: Metric
    templates: tuple[str, ...]
    published: str | None = None

    @property
    def is_multi_label(self) -> bool:
        """Whether a picture may show several of the labels."""
        return self.metric == "map_11_points"


@cache
def load_tasks() -> dict[str, Task]:
    """Every task of prompts.toml by name."""
    return _parse(PROMPTS_PATH)


def find_task(name: str) -> Task | None:
    """The task of this name; eurosat-clip is eurosat_clip."""
    return {_plain(known): task for known, task in load_tasks().items()}.get(_plain(name))


def general_task(name: str) -> Task:
    """For a folder that is no known task."""
    templates = tuple(tomllib.loads(PROMPTS_PATH.read_text(encoding="utf-8"))["prompts"][_GENERAL])
    return Task(name, name, "accuracy", templates)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _parse(path: Path) -> dict[str, Task]:
    parsed = tomllib.loads(path.read_text(encoding="utf-8"))
    sets: dict[str, list[str]] = parsed["prompts"]
    tasks: dict[str, Task] = {}
    for name, entry in parsed["tasks"].items():
        if entry["metric"] not in get_args(Metric):
            raise InvalidInput(f"{path}: task {name}: metric {entry['metric']!r}, known are {get_args(Metric)}")
        templates = dict.fromkeys(template for chosen in entry["prompts"] for template in sets[chosen])
        tasks[name] = Task(name, entry["title"], entry["metric"], tuple(templates), entry.get("published"))
    return tasks
