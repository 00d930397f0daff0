"""metrics.jsonl: what is appended reads back, and a kill or a resume leaves a file without holes or repetitions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.records import step_record, validation_record
from training.metrics import MetricsLog, StepRecord, best_validation, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def test_a_record_is_a_line_of_the_documented_keys(path: Path) -> None:
    log = MetricsLog(path)
    log.append(step_record(1))
    log.append(validation_record(1, zero_shot_accuracy=0.5))
    step, validation = map(json.loads, path.read_text().splitlines())
    assert step == {
        "kind": "step", "step": 1, "epoch": 1, "loss": 2.5, "lr": 3e-4, "grad_norm": 0.75, "logit_scale": 14.25,
        "samples_per_s": 512, "step_s": 1.0, "data_wait_s": 0.25, "num_unreadable": 0,
    }  # fmt: skip
    assert validation == {
        "kind": "validation", "step": 1, "epoch": 1, "elapsed_s": 3.5, "zero_shot_accuracy": 0.5,
        "text_to_image": {"r1": 0.25, "r5": 0.5, "r10": 0.75, "num_queries": 5942, "mean_recall": 0.5},
        "image_to_text": {"r1": 0.125, "r5": 0.375, "r10": 0.625, "num_queries": 1852, "mean_recall": 0.375},
        "mean_recall": 0.4375,
    }  # fmt: skip


def test_records_read_back_as_they_were(path: Path) -> None:
    """All their fields, optional ones too."""
    written = [
        step_record(1),
        replace(step_record(2), image_accuracy=0.5, text_accuracy=0.25, distill_loss=0.1, loss_scale=65536.0),
        validation_record(2),
        validation_record(3, zero_shot_accuracy=0.0),
    ]
    for record in written:
        MetricsLog(path).append(record)
    assert list(read_metrics(path)) == written


def test_what_is_not_finite_is_null_and_reads_back_as_nan(path: Path) -> None:
    """JSON has neither NaN nor Infinity, and other programs read the file too."""
    MetricsLog(path).append(step_record(1, loss=math.nan, grad_norm=math.inf))
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["loss"] is values["grad_norm"] is None
    (record,) = read_metrics(path)
    assert isinstance(record, StepRecord)
    assert math.isnan(record.loss)
    assert record.lr == 3e-4


def test_a_line_is_on_disk_when_append_returns(path: Path) -> None:
    """Nothing waits in this process, which may be killed."""
    log = MetricsLog(path)
    for step in range(1, 4):
        log.append(step_record(step))
        assert [record.step for record in read_metrics(path)] == list(range(1, step + 1))


@pytest.mark.parametrize("step", [0, 3, 5, 99])
def test_a_rewind_leaves_out_what_came_after(path: Path, step: int) -> None:
    """And appending goes on from there."""
    log = MetricsLog(path)
    for number in range(1, 6):
        log.append(step_record(number))
    log.append(validation_record(5))
    log.rewind(step)
    kept = [number for number in range(1, 6) if number <= step] + ([5] if step >= 5 else [])
    assert [record.step for record in read_metrics(path)] == kept
    log.append(step_record(step + 1))
    assert [record.step for record in read_metrics(path)] == [*kept, step + 1]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [1, 2, 30, -1])
def test_a_line_that_a_kill_cut_short_is_dropped(path: Path, cut: int) -> None:
    """Even by its newline alone, after which the next record would share its line."""
    log = MetricsLog(path)
    log.append(step_record(1))
    log.append(step_record(2))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[:cut] if cut < 0 else whole[: first + cut])
    log.rewind(2)
    kept = [1, 2] if cut < 0 else [1]
    assert [record.step for record in read_metrics(path)] == kept
    log.append(step_record(3))
    assert [record.step for record in read_metrics(path)] == [*kept, 3]


def test_reading_passes_over_what_is_no_record(path: Path) -> None:
    """Of another version, of another kind, or no JSON at all; a key of a later version does not hide a record."""
    MetricsLog(path).append(step_record(1))
    later = json.loads(path.read_text()) | {"step": 2, "colour": "blue"}
    with open(path, "a") as file:
        for line in ('{"kind": "weather"}', "[]", "7", "\xff", '{"kind": "step", "step": 1}', '{"kind": "validation"}'):
            file.write(line + "\n")
        file.write(json.dumps(later) + "\n")
    assert list(read_metrics(path)) == [step_record(1), replace(step_record(2), epoch=1)]


@pytest.mark.parametrize(("until_step", "best"), [(0, None), (10, 10), (29, 20), (99, 30)])
def test_the_best_validation_up_to_a_step(path: Path, until_step: int, best: int | None) -> None:
    for record in (validation_record(10, 0.2), validation_record(20, 0.4), step_record(21), validation_record(30, 0.5)):
        MetricsLog(path).append(record)
    MetricsLog(path).append(validation_record(40, 0.1))
    found = best_validation(path, until_step)
    assert (found.step if found else None) == best


def test_a_run_without_a_file_has_no_records(path: Path) -> None:
    MetricsLog(path).rewind(3)
    assert list(read_metrics(path)) == []
