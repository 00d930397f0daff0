"""Who is told about a run: metrics.jsonl, the terminal, TensorBoard, Weights & Biases.

    with Watchers([*saved_views(recipe, resumed_step), terminal_view(console, plan)]) as watchers:
        watchers.on_step(record)

Process 0 alone has any. What one of them does cannot end the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from training.metrics import METRICS_FILE, MetricsLog, StepRecord, ValidationRecord
from training.recipe import Recipe
from tuwen.errors import MissingDependency
from tuwen.files import write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class Watcher:
    """Hears what happens; a method that a watcher does not write does nothing."""

    def on_step(self, record: StepRecord) -> None: ...

    def on_validation(self, record: ValidationRecord) -> None: ...

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A state to resume from, or the result, lies at `path`."""

    def on_note(self, note: str) -> None:
        """A sentence for the person in front of it: a warning, a resume, an end."""

    def on_activity(self, what: str) -> None:
        """What goes on between the steps, for as long as it does: `validating, 320 of 1852`; "" is none."""

    def close(self) -> None: ...


class Watchers(Watcher):
    """Several as one. One that fails is told of once and hears no more."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = list(watchers)

    def on_step(self, record: StepRecord) -> None:
        self._each(lambda watcher: watcher.on_step(record))

    def on_validation(self, record: ValidationRecord) -> None:
        self._each(lambda watcher: watcher.on_validation(record))

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._each(lambda watcher: watcher.on_checkpoint(step, path))

    def on_note(self, note: str) -> None:
        self._each(lambda watcher: watcher.on_note(note))

    def on_activity(self, what: str) -> None:
        self._each(lambda watcher: watcher.on_activity(what))

    def close(self) -> None:
        self._each(lambda watcher: watcher.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _each(self, tell: Callable[[Watcher], None]) -> None:
        for watcher in tuple(self._watchers):
            try:
                tell(watcher)
            except Exception as error:  # a full disk or a lost connection of a view is no reason to lose the run
                self._watchers.remove(watcher)
                log.warning("%s has stopped: %s: %s", type(watcher).__name__, type(error).__name__, error)


def saved_views(recipe: Recipe, resumed_step: int = 0) -> list[Watcher]:
    """Those that keep what they hear, below `run.out`; what they have of steps after `resumed_step` is undone.

    Raises:
        MissingDependency: the recipe asks for one whose package is not installed.
    """
    out, run = recipe.run.out, recipe.run
    views: list[Watcher] = []
    # The optional ones first: a missing package is said before anything is undone.
    if run.tensorboard:
        views.append(TensorBoardView(out / "tensorboard", resumed_step))
    if run.wandb_project:
        views.append(WandbView(run.wandb_project, recipe, resumed_step))
    return [MetricsView(out / METRICS_FILE, resumed_step), *views]


class MetricsView(Watcher):
    """metrics.jsonl."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._log = MetricsLog(path)
        self._log.rewind(resumed_step)

    def on_step(self, record: StepRecord) -> None:
        self._log.append(record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._log.append(record)


def named_figures(record: StepRecord | ValidationRecord) -> dict[str, float]:
    """A record as the curves of a dashboard: train/loss, valid/text_to_image_r1, ...; without what is not there."""
    if isinstance(record, StepRecord):
        figures = {f"train/{name}": value for name, value in vars(record).items() if name not in ("step", "epoch")}
    else:
        figures = {"valid/mean_recall": record.mean_recall, "valid/zero_shot_accuracy": record.zero_shot_accuracy}
        for direction in ("text_to_image", "image_to_text"):
            for name in ("r1", "r5", "r10", "mean_recall"):
                figures[f"valid/{direction}_{name}"] = getattr(getattr(record, direction), name)
    return {name: float(value) for name, value in figures.items() if value is not None and math.isfinite(value)}


# --- TensorBoard ------------------------------------------------------------------------------------------------


class TensorBoardView(Watcher):
    """Event files in a folder: tensorboard --logdir RUN/tensorboard"""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependency("run.tensorboard needs its package: pip install tensorboard") from None
        # TensorBoard hides what it has from purge_step on.
        self._writer: SummaryWriter = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def on_step(self, record: StepRecord) -> None:
        self._add(record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._add(record)
        self._writer.flush()

    def on_checkpoint(self, step: int, path: Path) -> None:
        # A run that resumes from here does not repeat these steps.
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, record: StepRecord | ValidationRecord) -> None:
        for name, value in named_figures(record).items():
            self._writer.add_scalar(name, value, record.step)


# --- Weights & Biases -------------------------------------------------------------------------------------------


class WandbView(Watcher):
    """A run on Weights & Biases; a resumed one goes on under the id that its first start left in the folder."""

    def __init__(self, project: str, recipe: Recipe, resumed_step: int) -> None:
        try:
            import wandb  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise MissingDependency("run.wandb_project needs its package: pip install wandb") from None
        out, id_path = recipe.run.out, recipe.run.out / "wandb_id.txt"
        out.mkdir(parents=True, exist_ok=True)
        known_id = id_path.read_text(encoding="utf-8").strip() if resumed_step and id_path.exists() else None
        self._run: Any = wandb.init(
            project=project,
            name=out.name,
            id=known_id,
            resume="allow",
            dir=str(out),
            config=recipe.model_dump(mode="json"),
        )
        write_text(id_path, self._run.id + "\n")
        # What it has already it keeps: it takes no step twice.
        self._first_step = self._run.step

    def on_step(self, record: StepRecord) -> None:
        self._log(record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._log(record)

    def close(self) -> None:
        self._run.finish()

    def _log(self, record: StepRecord | ValidationRecord) -> None:
        if record.step >= self._first_step:
            self._run.log(named_figures(record), step=record.step)
