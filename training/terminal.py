"""A run as a person sees it: a live view in a terminal, plain log lines anywhere else.

    view = terminal_view(console, RunPlan(out, num_steps=2800, num_epochs=100, log_every_steps=10))

The live view redraws itself on `console`, which is that of stderr; what is logged meanwhile appears above it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from training.metrics import StepRecord, ValidationRecord
from training.watchers import Watcher
from tuwen.embed import RetrievalScores

log = logging.getLogger(__name__)

# Half of a smoothed figure comes from the last 34 steps.
_DECAY = 0.98
_REFRESHES_PER_S = 4


@dataclass(frozen=True)
class RunPlan:
    """What is to be done: of `num_steps`, those after `first_step`, which a resumed run starts from."""

    out: Path
    num_steps: int
    num_epochs: int
    log_every_steps: int
    first_step: int = 0
    best: ValidationRecord | None = None


def terminal_view(console: Console, plan: RunPlan) -> Watcher:
    """Starts at once; `close` leaves the last state on the screen."""
    return LiveView(console, plan) if console.is_terminal else LogLines(plan)


class Smoothed:
    """An exponential mean, unbiased from its first value on; what is not finite leaves it as it is."""

    def __init__(self) -> None:
        self._sum, self._weight = 0.0, 0.0

    def add(self, value: float) -> None:
        if value - value == 0:  # neither NaN nor infinite
            self._sum = _DECAY * self._sum + (1 - _DECAY) * value
            self._weight = _DECAY * self._weight + (1 - _DECAY)

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 0.0


class RunState:
    """What both views show: the newest of everything, means of what jumps about, and the time that is left."""

    def __init__(self, plan: RunPlan, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan, self._clock, self._started = plan, clock, clock()
        self.step: StepRecord | None = None
        self.last: ValidationRecord | None = None
        self.best = plan.best
        self.loss, self.samples_per_s, self._step_s, self._data_wait_s = (Smoothed() for _ in range(4))

    def add_step(self, record: StepRecord) -> None:
        self.step = record
        self.loss.add(record.loss)
        self.samples_per_s.add(record.samples_per_s)
        self._step_s.add(record.step_s)
        self._data_wait_s.add(record.data_wait_s)

    def add_validation(self, record: ValidationRecord) -> None:
        self.last = record
        if self.best is None or record.mean_recall > self.best.mean_recall:
            self.best = record

    @property
    def num_done(self) -> int:
        return self.step.step if self.step else self.plan.first_step

    @property
    def waiting(self) -> float:
        """The share of the time that goes by waiting for data."""
        return self._data_wait_s.value / self._step_s.value if self._step_s.value else 0.0

    @property
    def left(self) -> str:
        """By what the steps of this start took so far, validations and checkpoints with them: 1:02:03."""
        done = self.num_done - self.plan.first_step
        if not done:
            return "-:--:--"
        per_step_s = (self._clock() - self._started) / done
        return str(timedelta(seconds=round(per_step_s * (self.plan.num_steps - self.num_done))))


# --- live -------------------------------------------------------------------------------------------------------


class LiveView(Watcher):
    """A few lines that are redrawn in place; at most 80 columns."""

    def __init__(self, console: Console, plan: RunPlan, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = RunState(plan, clock)
        self._checkpoint = self._activity = ""
        self._live = Live(self, console=console, refresh_per_second=_REFRESHES_PER_S, vertical_overflow="visible")
        self._live.start()

    def on_step(self, record: StepRecord) -> None:
        self._state.add_step(record)

    def on_validation(self, record: ValidationRecord) -> None:
        self._state.add_validation(record)

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._checkpoint = f"step {step}, {path}"

    def on_note(self, note: str) -> None:
        log.info("%s", note)

    def on_activity(self, what: str) -> None:
        self._activity = what

    def close(self) -> None:
        self._activity = ""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts: list[RenderableType] = [self._bar()]
        if self._state.step:
            parts.append(self._figures(self._state.step))
        if self._state.best:
            parts.append(self._recalls(self._state.best))
        for name, value in (("saved", self._checkpoint), ("now", self._activity)):
            if value:
                parts.append(_line(f"{name:<12}{value}"))
        yield Group(*parts)

    def _bar(self) -> Table:
        state, plan = self._state, self._state.plan
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(plan.num_steps, state.num_done, width=36)
        share = f"{state.num_done / max(1, plan.num_steps):.0%}"
        grid.add_row(bar, f"{state.num_done}/{plan.num_steps}", share, f"{state.left} left")
        return grid

    def _figures(self, record: StepRecord) -> Table:
        state = self._state
        grid = Table.grid(padding=(0, 2, 0, 0))
        for width in (10, 26, 11, 25):
            grid.add_column(width=width, no_wrap=True)
        for row in (
            ("epoch", f"{record.epoch} of {state.plan.num_epochs}", "lr", f"{record.lr:.3g}"),
            ("loss", f"{record.loss:.4f}, mean {state.loss.value:.4f}", "grad norm", f"{record.grad_norm:.3g}"),
            ("samples/s", f"{state.samples_per_s.value:.0f}", "logit scale", f"{record.logit_scale:.2f}"),
            ("data wait", f"{state.waiting:.0%} of the time", "unreadable", str(record.num_unreadable)),
        ):
            grid.add_row(*(Text(cell, style="bold" if column % 2 else "dim") for column, cell in enumerate(row)))
        return grid

    def _recalls(self, best: ValidationRecord) -> Text:
        last = self._state.last
        lines = [
            f"{'':<14}{'text to image':>21}{'image to text':>24}",
            f"{'recall':<14}{'R@1    R@5   R@10':>21}{'R@1    R@5   R@10':>24}{'mean':>9}",
            *(_recall_line(name, record) for name, record in (("last", last), ("best", best)) if record),
        ]
        if last and last.zero_shot_accuracy is not None:
            lines.append(f"{'zero-shot':<14}{last.zero_shot_accuracy:>7.1%}")
        return _line("\n".join(lines))


def _recall_line(name: str, record: ValidationRecord) -> str:
    ways = (record.text_to_image, record.image_to_text)
    figures = [" ".join(f"{value:>6}" for value in _percent(scores)) for scores in ways]
    return f"{f'{name} {record.step}':<15}{figures[0]}    {figures[1]}  {record.mean_recall:>7.1%}"


def _percent(scores: RetrievalScores) -> tuple[str, str, str]:
    return f"{scores.r1:.1%}", f"{scores.r5:.1%}", f"{scores.r10:.1%}"


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


# --- plain ------------------------------------------------------------------------------------------------------


class LogLines(Watcher):
    """A line every `log_every_steps`, three a validation, for files and pipes; 80 columns hold all but huge figures."""

    def __init__(self, plan: RunPlan, clock: Callable[[], float] = time.monotonic) -> None:
        self._state = RunState(plan, clock)

    def on_step(self, record: StepRecord) -> None:
        state, plan = self._state, self._state.plan
        state.add_step(record)
        if record.step % plan.log_every_steps and record.step != plan.num_steps:
            return
        log.info(
            "%d/%d epoch %d loss %.3f lr %.2g norm %.2g %.0f/s wait %.0f%% left %s",
            record.step, plan.num_steps, record.epoch, state.loss.value, record.lr, record.grad_norm,
            state.samples_per_s.value, 100 * state.waiting, state.left,
        )  # fmt: skip

    def on_validation(self, record: ValidationRecord) -> None:
        self._state.add_validation(record)
        for name, scores in (("text to image", record.text_to_image), ("image to text", record.image_to_text)):
            log.info("step %d %s: R@1 %s R@5 %s R@10 %s", record.step, name, *_percent(scores))
        best, accuracy = self._state.best, record.zero_shot_accuracy
        log.info(
            "step %d mean recall %.1f%%, best %.1f%% at step %d%s",
            record.step, 100 * record.mean_recall, 100 * best.mean_recall if best else 0, best.step if best else 0,
            "" if accuracy is None else f"; zero-shot {accuracy:.1%}",
        )  # fmt: skip

    def on_checkpoint(self, step: int, path: Path) -> None:
        log.info("step %d saved: %s", step, path)

    def on_note(self, note: str) -> None:
        log.info("%s", note)
