"""Those who are told about a run: real event files read back, and a missing package as one sentence."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from tests.training.records import step_record, validation_record
from training.metrics import StepRecord, read_metrics
from training.recipe import Recipe
from training.watchers import TensorBoardView, Watcher, Watchers, saved_views
from tuwen.errors import MissingDependency


def recipe_for(out: Path, **run: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"architecture": "Tiny-RN"},
            "data": {"path": "data"},
            "optim": {"epochs": 1, "batch_size": 8},
            "run": {"out": out} | run,
        }
    )


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each curve, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Listener(Watcher):
    """Remembers the steps; or fails at one."""

    def __init__(self, fails_at: int = 0) -> None:
        self.steps: list[int] = []
        self.closed = False
        self.fails_at = fails_at

    def on_step(self, record: StepRecord) -> None:
        if record.step == self.fails_at:
            raise OSError("no space left on device")
        self.steps.append(record.step)

    def close(self) -> None:
        self.closed = True


def test_all_are_told_and_closed() -> None:
    """Also of what they do not listen to, and when the run ends in an error."""
    one, other = Listener(), Listener()

    def run_until_it_diverges() -> None:
        with Watchers([one, other]) as watchers:
            watchers.on_step(step_record(1))
            watchers.on_validation(validation_record(1))
            watchers.on_checkpoint(1, Path("out"))
            watchers.on_note("a note")
            watchers.on_activity("validating")
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        run_until_it_diverges()
    assert one.steps == other.steps == [1]
    assert one.closed
    assert other.closed


def test_one_that_fails_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """It is told of once; the others go on."""
    failing, well = Listener(fails_at=2), Listener()
    with caplog.at_level(logging.WARNING), Watchers([failing, well]) as watchers:
        for step in range(1, 5):
            watchers.on_step(step_record(step))
    assert (failing.steps, well.steps) == ([1], [1, 2, 3, 4])
    assert caplog.messages == ["Listener has stopped: OSError: no space left on device"]


def test_metrics_are_always_kept(tmp_path: Path) -> None:
    """And a resumed run's begin where its checkpoint was."""
    for resumed_step, steps in ((0, range(1, 6)), (3, range(4, 8))):
        (view,) = saved_views(recipe_for(tmp_path / "out"), resumed_step)
        for step in steps:
            view.on_step(step_record(step))
        view.on_validation(validation_record(steps[-1]))
        view.close()
    records = list(read_metrics(tmp_path / "out" / "metrics.jsonl"))
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6, 7, 7]
    assert records[-1] == validation_record(7)


# --- TensorBoard --------------------------------------------------------------------------------------------------


def test_tensorboard_has_all_curves(tmp_path: Path) -> None:
    """Each figure under its name at its step; what is not finite leaves a gap, as TensorBoard plots none."""
    with Watchers(saved_views(recipe_for(tmp_path / "out", tensorboard=True))) as watchers:
        watchers.on_step(step_record(1, loss=3.0))
        watchers.on_step(step_record(2, loss=2.0, grad_norm=float("inf")))
        watchers.on_validation(validation_record(2, zero_shot_accuracy=0.5))
    found = curves(tmp_path / "out" / "tensorboard")
    assert found["train/loss"] == [(1, 3.0), (2, 2.0)]
    assert found["train/grad_norm"] == [(1, 0.75)]
    assert found["train/samples_per_s"] == [(1, 512), (2, 512)]
    assert found["valid/text_to_image_r1"] == [(2, 0.25)]
    assert found["valid/image_to_text_r10"] == [(2, 0.625)]
    assert found["valid/mean_recall"] == [(2, 0.4375)]
    assert found["valid/zero_shot_accuracy"] == [(2, 0.5)]
    assert "train/distill_loss" not in found


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path: Path) -> None:
    """Steps 4 and 5 happened twice; the first time is hidden."""
    for resumed_step, steps, loss in ((0, range(1, 6), 3.0), (3, range(4, 7), 1.0)):
        view = TensorBoardView(tmp_path, resumed_step)
        for step in steps:
            view.on_step(step_record(step, loss))
        view.close()
    assert curves(tmp_path)["train/loss"] == [(1, 3.0), (2, 3.0), (3, 3.0), (4, 1.0), (5, 1.0), (6, 1.0)]


@pytest.mark.parametrize("event", ["checkpoint", "validation"])
def test_tensorboard_has_what_a_checkpoint_covers(tmp_path: Path, event: str) -> None:
    """A killed run resumes after these steps, and would leave a gap of up to two minutes."""
    view = TensorBoardView(tmp_path, 0)
    view.on_step(step_record(1))
    if event == "checkpoint":
        view.on_checkpoint(1, tmp_path)
    else:
        view.on_validation(validation_record(1))
    assert curves(tmp_path)["train/loss"] == [(1, 2.5)]
    view.close()


# --- what is not installed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "setting", "sentence"),
    [
        ("torch.utils.tensorboard", {"tensorboard": True}, r"^run\.tensorboard needs .*: pip install tensorboard$"),
        ("wandb", {"wandb_project": "p"}, r"^run\.wandb_project needs its package: pip install wandb$"),
    ],
)
def test_a_missing_package_is_one_sentence(
    module: str, setting: dict[str, object], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of an earlier run is touched."""
    (view,) = saved_views(recipe_for(tmp_path))
    view.on_step(step_record(1))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=sentence):
        saved_views(recipe_for(tmp_path, **setting))
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 1


def test_wandb_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, offline; a run that begins anew gets an id of its own."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for resumed_step in (0, 5, 0):
        with Watchers(saved_views(recipe_for(tmp_path, wandb_project="tuwen"), resumed_step)) as watchers:
            watchers.on_step(step_record(resumed_step + 1))
            watchers.on_validation(validation_record(resumed_step + 1))
        ids.append((tmp_path / "wandb_id.txt").read_text().strip())
    assert ids[0] == ids[1] != ids[2]
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 3
