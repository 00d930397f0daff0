"""The live view as it is drawn, and the log lines that stand in for it where there is no terminal."""

from __future__ import annotations

import io
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.training.records import step_record, validation_record
from training.terminal import LiveView, LogLines, RunPlan, Smoothed, terminal_view

PLAN = RunPlan(Path("runs/muge"), num_steps=2800, num_epochs=100, log_every_steps=10)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def terminal() -> Console:
    """80 columns that remember what is printed."""
    return Console(width=80, file=io.StringIO(), force_terminal=True, record=True, emoji=False)


def drawn(view: LiveView) -> str:
    """What the view shows at this moment."""
    console = terminal()
    console.print(view)
    return console.export_text()


def test_a_terminal_gets_the_live_view_and_a_pipe_lines() -> None:
    view = terminal_view(terminal(), PLAN)
    assert isinstance(view, LiveView)
    view.close()
    assert isinstance(terminal_view(Console(file=io.StringIO()), PLAN), LogLines)


def test_the_live_view_shows_everything_in_80_columns() -> None:
    clock = Clock()
    view = LiveView(terminal(), PLAN, clock)
    clock.now += 700
    view.on_step(replace(step_record(700), epoch=25, num_unreadable=3))
    view.on_validation(validation_record(300, r1=0.5))
    view.on_validation(validation_record(600, r1=0.25, zero_shot_accuracy=0.375))
    view.on_checkpoint(600, Path("runs/muge/checkpoints/step_00000600"))
    view.on_activity("validating, 320 of 1852 pictures")
    text = drawn(view)
    view.close()
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0].endswith("700/2800 25% 0:35:00 left")  # a second each so far, 2,100 to go
    assert lines[1:] == [
        "epoch       25 of 100                   lr           0.0003",
        "loss        2.5000, mean 2.5000         grad norm    0.75",
        "samples/s   512                         logit scale  14.25",
        "data wait   25% of the time             unreadable   3",
        "                      text to image           image to text",
        "recall            R@1    R@5   R@10       R@1    R@5   R@10     mean",
        "last 600        25.0%  50.0%  75.0%     12.5%  37.5%  62.5%    43.8%",
        "best 300        50.0%  50.0%  75.0%     12.5%  37.5%  62.5%    47.9%",
        "zero-shot       37.5%",
        "saved       step 600, runs/muge/checkpoints/step_00000600",
        "now         validating, 320 of 1852 pictures",
    ]


def test_it_stays_in_80_columns_whatever_the_figures() -> None:
    """Eight digits of steps, wild losses, a path longer than the line."""
    plan = RunPlan(Path("runs"), 99_999_999, 12_345, 10)
    view = LiveView(terminal(), plan, Clock())
    view.on_step(replace(step_record(98_765_432), loss=-1.23456e12, grad_norm=1.5e-17, samples_per_s=1e6, epoch=12_345))
    view.on_validation(replace(validation_record(98_765_432, r1=1.0)))
    view.on_checkpoint(98_765_432, Path("/".join(["a long folder name"] * 9)))
    view.on_activity("checking " * 20)
    lines = drawn(view).splitlines()
    view.close()
    assert max(map(len, lines)) <= 80
    assert lines[-1].endswith("…")


def test_before_the_first_step_there_is_a_bar_alone() -> None:
    view = LiveView(terminal(), replace(PLAN, first_step=1400), Clock())
    text = drawn(view)
    view.close()
    assert len(text.splitlines()) == 1
    assert "1400/2800 50% -:--:-- left" in text


def test_a_resumed_run_counts_its_own_time_and_knows_the_best() -> None:
    """400 steps in 200 seconds since the resume, 1,000 to go; a best of the start before stays the best."""
    clock = Clock()
    view = LiveView(terminal(), replace(PLAN, first_step=1400, best=validation_record(300, r1=0.75)), clock)
    clock.now += 200
    view.on_step(step_record(1800))
    view.on_validation(validation_record(1800, r1=0.5))
    text = drawn(view)
    view.close()
    assert "0:08:20 left" in text
    assert "best 300        75.0%" in text
    assert "last 1800       50.0%" in text


def test_the_last_state_stays_on_the_screen() -> None:
    """And the cursor, which is hidden meanwhile, comes back."""
    console = terminal()
    view = LiveView(console, PLAN, Clock())
    view.on_step(step_record(2800))
    view.on_activity("saving")
    view.close()
    assert isinstance(console.file, io.StringIO)
    screen = console.file.getvalue()
    assert screen.rstrip("\n").endswith("\x1b[?25h")
    last_drawing = screen[screen.rindex("2800/2800") :]
    assert "logit scale" in last_drawing
    assert "saving" not in last_drawing


def test_smoothing_is_unbiased_and_passes_over_what_is_not_finite() -> None:
    smoothed = Smoothed()
    assert smoothed.value == 0
    for value in (4.0, math.nan, math.inf, 4.0):
        smoothed.add(value)
    assert smoothed.value == pytest.approx(4)
    for _ in range(34):  # half of it is of these
        smoothed.add(2.0)
    assert 2.0 < smoothed.value < 3.0


# --- lines --------------------------------------------------------------------------------------------------------


def test_lines_come_every_so_many_steps_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    view = LogLines(replace(PLAN, num_steps=25), clock)
    with caplog.at_level(logging.INFO):
        for step in range(1, 26):
            clock.now += 2
            view.on_step(step_record(step))
    assert caplog.messages == [
        "10/25 epoch 2 loss 2.500 lr 0.0003 norm 0.75 512/s wait 25% left 0:00:30",
        "20/25 epoch 3 loss 2.500 lr 0.0003 norm 0.75 512/s wait 25% left 0:00:10",
        "25/25 epoch 3 loss 2.500 lr 0.0003 norm 0.75 512/s wait 25% left 0:00:00",
    ]


def test_lines_tell_validations_checkpoints_and_notes(caplog: pytest.LogCaptureFixture) -> None:
    view = LogLines(PLAN, Clock())
    with caplog.at_level(logging.INFO):
        view.on_validation(validation_record(300, r1=0.5))
        caplog.clear()
        view.on_validation(validation_record(600, zero_shot_accuracy=0.375))
        view.on_checkpoint(600, Path("runs/muge"))
        view.on_note("100% of it, as %s")
    assert caplog.messages == [
        "step 600 text to image: R@1 25.0% R@5 50.0% R@10 75.0%",
        "step 600 image to text: R@1 12.5% R@5 37.5% R@10 62.5%",
        "step 600 mean recall 43.8%, best 47.9% at step 300; zero-shot 37.5%",
        "step 600 saved: runs/muge",
        "100% of it, as %s",
    ]
    assert max(map(len, caplog.messages)) <= 80
