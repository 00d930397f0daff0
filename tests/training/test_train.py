"""A real run on 20 coloured shapes: it learns, it leaves what it promises, and it can be repeated."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import shape_pairs, write_pairs
from training.feature_loss import FeatureLoss
from training.metrics import StepRecord, ValidationRecord, read_metrics
from training.recipe import Recipe
from training.state import newest_state
from training.train import Run, Stopped, TrainingDiverged, train
from training.watchers import Watcher, Watchers, saved_views
from tuwen.checkpoint import load_checkpoint, save_checkpoint
from tuwen.data.pairs import open_pairs
from tuwen.embed import score_retrieval
from tuwen.errors import InvalidInput
from tuwen.image_transform import preprocess_image
from tuwen.model import MAX_LOGIT_SCALE
from tuwen.specs import SPECS
from tuwen.vision import VisionTransformer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in SMALL_SPECS.values():
        monkeypatch.setitem(SPECS, spec.name, spec)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for split in ("train", "valid"):
        write_pairs(folder, split, shape_pairs())
    return folder


def recipe_for(shapes: Path, out: Path, architecture: str = "Small-ViT", **changes: dict[str, object]) -> Recipe:
    """Two steps of ten pictures an epoch; `changes` are keys of its sections."""
    sections: dict[str, dict[str, object]] = {
        "model": {"architecture": architecture},
        "data": {"path": shapes, "captions_per_image": 2, "cache_decoded": True},
        "optim": {"epochs": 3, "batch_size": 10, "lr": 3e-3, "warmup_steps": 2},
        "augment": {"rotate_degrees": 5, "translate": 0.05},
        "engine": {"device": "cpu"},
        "run": {"out": out},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return Recipe.model_validate(sections)


class Listener(Watcher):
    """Keeps what it hears; asks the run to stop after a step, as a scheduler does."""

    def __init__(self, stop_after: int = -1) -> None:
        self.steps: list[StepRecord] = []
        self.validations: list[ValidationRecord] = []
        self._stop_after = stop_after

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)
        if record.step == self._stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation(self, record: ValidationRecord) -> None:
        self.validations.append(record)


def watched(listener: Listener, run: Run) -> Watcher:
    return Watchers([*saved_views(run.recipe, run.step), listener])


def run_with(recipe: Recipe, stop_after: int = -1) -> Listener:
    listener = Listener(stop_after)
    train(recipe, watch=lambda run: watched(listener, run))
    return listener


def weights_of(out: Path) -> dict[str, Tensor]:
    """Of the newest state, float32."""
    folder = newest_state(out)
    assert folder is not None
    return load_checkpoint(folder).state_dict()


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    expected = weights_of(other)
    for key, value in weights_of(one).items():
        assert torch.equal(value, expected[key]), key


@dataclass(frozen=True)
class Finished:
    recipe: Recipe
    out: Path
    heard: Listener


@pytest.fixture(scope="module")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """20 epochs of the small ResNet, which learns fast; the shorter runs below are of the small ViT."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, "Small-RN", SMALL_SPECS["resnet"])
        recipe = recipe_for(
            shapes,
            tmp_path_factory.mktemp("run") / "shapes",
            "Small-RN",
            data={"captions_per_image": 1},
            optim={"epochs": 20},
            valid={"every_epochs": 5},
            run={"save_every_epochs": 5},
        )
        return Finished(recipe, recipe.run.out, run_with(recipe))


def test_it_learns(finished: Finished) -> None:
    """Over 6 seeds the loss fell to 0.28..0.51 of what it was, and recall@10 of 20 pictures rose to 0.92..1.00."""
    losses = [record.loss for record in finished.heard.steps]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert finished.heard.validations[-1].text_to_image.r10 > 0.7


def test_metrics_have_a_record_for_each_step_and_validation(finished: Finished) -> None:
    records = list(read_metrics(finished.out / "metrics.jsonl"))
    steps = [record for record in records if isinstance(record, StepRecord)]
    validations = [record for record in records if isinstance(record, ValidationRecord)]
    assert [record.step for record in steps] == list(range(1, 41))
    assert [(record.epoch, record.step) for record in validations] == [(5, 10), (10, 20), (15, 30), (20, 40)]
    assert validations == finished.heard.validations
    assert all(record.samples_per_s > 0 and math.isfinite(record.grad_norm) for record in steps)


def test_recall_is_that_of_the_saved_weights(finished: Finished) -> None:
    scores = score_retrieval(
        load_checkpoint(finished.out), open_pairs(finished.recipe.data.all_sources[0].path, "valid")
    )
    # One text of 25 may change sides where fp16 decides a near tie.
    assert finished.heard.validations[-1].text_to_image.r10 == pytest.approx(scores["text_to_image"].r10, abs=0.05)
    assert finished.heard.validations[-1].image_to_text.r10 == pytest.approx(scores["image_to_text"].r10, abs=0.05)


def test_the_folder_is_a_checkpoint(finished: Finished) -> None:
    """It loads as the recipe's architecture; beside it are its metrics and the newest states, which load as well."""
    model = load_checkpoint(finished.out)
    assert model.spec == SPECS[finished.recipe.model.architecture]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert sorted(path.name for path in finished.out.iterdir()) == [
        "README.md", "checkpoints", "config.json", "metrics.jsonl", "model.safetensors"
    ]  # fmt: skip
    states = sorted(path.name for path in (finished.out / "checkpoints").iterdir())
    assert states == ["step_00000030", "step_00000040"]  # keep_last is 2
    for key, value in load_checkpoint(finished.out / "checkpoints" / "step_00000040").state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, atol=1e-3, rtol=1e-3)  # fp16 beside fp32


def test_the_card_tells_recall(finished: Finished) -> None:
    card = (finished.out / "README.md").read_text(encoding="utf-8")
    assert f"{finished.heard.validations[-1].text_to_image.r10:.1%}" in card


def test_the_same_seed_gives_the_same_weights(shapes: Path, tmp_path: Path) -> None:
    """Dropout and augmentation included; another seed gives others."""
    for name, seed in (("one", 5), ("other", 5), ("third", 6)):
        torch.rand(3)  # whatever was drawn before does not matter
        train(recipe_for(shapes, tmp_path / name, optim={"epochs": 1}, run={"seed": seed}))
    assert_same_weights(tmp_path / "one", tmp_path / "other")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "one", tmp_path / "third")


def test_validation_can_be_rarer(shapes: Path, tmp_path: Path) -> None:
    """Every second epoch, and the last in any case."""
    heard = run_with(recipe_for(shapes, tmp_path / "rare", valid={"every_epochs": 2}))
    assert [record.epoch for record in heard.validations] == [2, 3]


def test_without_validation_the_last_weights_are_the_result(shapes: Path, tmp_path: Path) -> None:
    heard = run_with(recipe_for(shapes, tmp_path / "out", optim={"epochs": 1}, valid={"split": ""}))
    assert heard.validations == []
    assert load_checkpoint(tmp_path / "out").spec.name == "Small-ViT"


def test_the_best_is_kept_where_it_is_asked_for(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three validations is the best; the result is its weights, not the last ones."""
    from training import train as module

    real, found = module.validate, iter((0.2, 0.9, 0.5))

    def graded(*arguments: object) -> ValidationRecord:
        record, share = real(*arguments), next(found)  # type: ignore[arg-type]
        scores = type(record.text_to_image)(share, share, share, 20)
        return type(record)(record.step, record.epoch, scores, scores, 0.0)

    monkeypatch.setattr(module, "validate", graded)
    recipe = recipe_for(shapes, tmp_path / "out", run={"keep_best": True, "keep_last": 3})
    train(recipe)
    result = load_checkpoint(tmp_path / "out").state_dict()
    second = load_checkpoint(tmp_path / "out" / "checkpoints" / "step_00000004").state_dict()
    assert all(torch.equal(result[key], second[key].half().float()) for key in result)


def test_fine_tuning_starts_from_its_checkpoint(shapes: Path, tmp_path: Path) -> None:
    """With a learning rate of nearly 0 the weights stay what they were."""
    model = random_model(SMALL_SPECS["vit"])
    save_checkpoint(model, tmp_path / "first", dtype=torch.float32)
    recipe = recipe_for(
        shapes, tmp_path / "tuned", model={"init_checkpoint": tmp_path / "first"}, optim={"epochs": 1, "lr": 1e-12}
    )
    tuned = load_checkpoint(train(recipe)).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(tuned[key], value.half().float()), key


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": {"precision": "bf16"}},
        {"engine": {"precision": "fp16"}},
        {"optim": {"epochs": 1, "ema_decay": 0.9, "layer_decay": 0.8, "chunk_size": 3}},
        {"loss": {"kind": "sigmoid"}},
        {"model": {"mask_ratio": 0.5, "freeze_text": True}},
        {"data": {"unit": "pair", "captions_per_image": 1, "num_workers": 1}},
    ],
    ids=lambda changes: "/".join(f"{key}={value}" for values in changes.values() for key, value in values.items()),
)
def test_every_way_runs_and_goes_on(changes: dict[str, dict[str, object]], shapes: Path, tmp_path: Path) -> None:
    """Stopped after two steps and gone on with, it ends with the very weights of the run that was not."""

    def recipe(name: str) -> Recipe:
        return recipe_for(
            shapes, tmp_path / name, **({"optim": {"epochs": 1, "batch_size": 5}} | changes), valid={"split": ""}
        )

    train(recipe("whole"))
    with pytest.raises(Stopped, match=r"stopped after step 1 of \d"):
        run_with(recipe("halves"), stop_after=1)
    train(recipe("halves"))
    assert_same_weights(tmp_path / "halves", tmp_path / "whole")


def test_a_student_learns_from_a_teacher(shapes: Path, tmp_path: Path) -> None:
    """Of another width, by a learned map; and the loss it is told includes the teacher's part."""
    save_checkpoint(random_model(SMALL_SPECS["resnet"]), tmp_path / "teacher")
    recipe = recipe_for(
        shapes,
        tmp_path / "student",
        distill={"teacher": tmp_path / "teacher", "feature_weight": 1.0, "logit_weight": 1.0},
    )
    heard = run_with(recipe)
    parts = [record.distill_loss for record in heard.steps]
    assert all(part is not None and 0 < part < record.loss for part, record in zip(parts, heard.steps, strict=True))


# --- going on -----------------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_done_again(finished: Finished) -> None:
    before = (finished.out / "model.safetensors").stat().st_mtime_ns
    heard = run_with(finished.recipe)
    assert heard.steps == []
    assert newest_state(finished.out) == finished.out / "checkpoints" / "step_00000040"
    assert len([one for one in read_metrics(finished.out / "metrics.jsonl") if isinstance(one, StepRecord)]) == 40
    assert (finished.out / "model.safetensors").stat().st_mtime_ns == before


def test_never_begins_anew(shapes: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shapes, tmp_path / "twice", optim={"epochs": 1})
    train(recipe)
    listener = Listener()
    train(recipe, "never", lambda run: watched(listener, run))
    assert [record.step for record in listener.steps] == [1, 2]
    assert len(list(read_metrics(tmp_path / "twice" / "metrics.jsonl"))) == 3


def test_another_recipe_is_no_continuation(shapes: Path, tmp_path: Path) -> None:
    """The sentence names the key. What only changes how it is computed or watched may differ."""
    train(recipe_for(shapes, tmp_path / "out", optim={"epochs": 1}))
    with pytest.raises(
        InvalidInput, match=r"another recipe \(optim\.lr was 0\.003, is 0\.1\); choose another run\.out"
    ):
        train(recipe_for(shapes, tmp_path / "out", optim={"epochs": 1, "lr": 0.1}))
    train(recipe_for(shapes, tmp_path / "out", optim={"epochs": 1, "chunk_size": 5}, run={"keep_last": 1}))


def test_a_damaged_state_is_one_sentence(shapes: Path, tmp_path: Path) -> None:
    recipe = recipe_for(shapes, tmp_path / "out", optim={"epochs": 1})
    train(recipe)
    state = tmp_path / "out" / "checkpoints" / "step_00000002" / "training_state" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InvalidInput, match=r"state\.pt: damaged or not a state of a run"):
        train(recipe)
    with pytest.raises(InvalidInput, match="no state of a run"):
        train(recipe, tmp_path)


# --- what goes wrong ----------------------------------------------------------------------------------------------


def break_loss(monkeypatch: pytest.MonkeyPatch, step: int, factor: float) -> None:
    """Multiply the loss of one step."""
    real, calls = FeatureLoss.forward, iter(range(1, 1000))

    def broken(self: FeatureLoss, *arguments: object) -> object:
        losses, share = real(self, *arguments)  # type: ignore[arg-type]
        if next(calls) != step:
            return losses, share
        return type(losses)(losses.total * factor, *list(vars(losses).values())[1:]), share * factor

    monkeypatch.setattr(FeatureLoss, "forward", broken)


@pytest.mark.parametrize("factor", [math.nan, 1e4], ids=["not a number", "exploded"])
def test_a_loss_without_a_way_back_ends_the_run(
    factor: float, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the step, its pictures and the last good state, which is still there."""
    break_loss(monkeypatch, 3, factor)
    reason = (
        r"loss is (nan|\d+).* at step 3 \(epoch 2, batch 0, pictures 1\d\d, .* and 2 more\); the last good state is"
    )
    with pytest.raises(TrainingDiverged, match=reason) as caught:
        train(recipe_for(shapes, tmp_path / "bad"))
    assert str(caught.value).endswith("step_00000002")
    assert all(torch.isfinite(value).all() for value in weights_of(tmp_path / "bad").values())
    assert len(list((tmp_path / "bad" / "checkpoints").iterdir())) == 1


def test_a_gradient_that_overflows_is_never_saved(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is as good as any, and no later one would tell."""
    real = FeatureLoss.forward

    def steep(self: FeatureLoss, *arguments: object) -> object:
        losses, share = real(self, *arguments)  # type: ignore[arg-type]
        return losses, share * math.inf

    monkeypatch.setattr(FeatureLoss, "forward", steep)
    recipe = recipe_for(shapes, tmp_path / "overflow", optim={"batch_size": 20, "epochs": 1})
    with pytest.raises(TrainingDiverged, match=r"gradient's norm (nan|inf), at step 1 .*; no weights were saved yet"):
        train(recipe)
    assert list((tmp_path / "overflow").iterdir()) == []


def test_a_missing_split_is_refused_before_training(shapes: Path, tmp_path: Path) -> None:
    """Also the validation split, which is first read an epoch later."""
    with pytest.raises(InvalidInput, match="no split 'test'"):
        train(recipe_for(shapes, tmp_path / "out", valid={"split": "test"}))
    assert not list(tmp_path.iterdir())


# --- the parts ----------------------------------------------------------------------------------------------------


def test_logit_scale_stays_below_its_limit(shapes: Path, tmp_path: Path) -> None:
    """ln 100, however hard the optimizer pushes."""
    model = random_model(SMALL_SPECS["vit"])
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    save_checkpoint(model, tmp_path / "first")
    recipe = recipe_for(
        shapes, tmp_path / "out", model={"init_checkpoint": tmp_path / "first"}, optim={"epochs": 1, "lr": 1e-9}
    )
    train(recipe)
    assert weights_of(tmp_path / "out")["logit_scale"].item() == pytest.approx(MAX_LOGIT_SCALE)


def test_the_schedule_is_the_optimizers(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate of 0 at every step nothing is learned, whatever the recipe's lr."""
    asked: list[tuple[int, int]] = []

    def nothing(step: int, num_steps: int, recipe: Recipe) -> float:
        asked.append((step, num_steps))
        return 0.0

    monkeypatch.setattr("training.train.learning_rate", nothing)
    save_checkpoint(random_model(SMALL_SPECS["vit"]), tmp_path / "first")
    recipe = recipe_for(shapes, tmp_path / "out", model={"init_checkpoint": tmp_path / "first"}, optim={"lr": 0.1})
    trained = load_checkpoint(train(recipe)).state_dict()
    assert asked == [(step, 6) for step in range(6)]
    for key, value in load_checkpoint(tmp_path / "first").state_dict().items():
        assert torch.equal(trained[key], value), key


def test_training_sees_what_serving_sees(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without augmentation the image tower is given preprocess_image's pixel_values, to float32's rounding."""
    seen: list[Tensor] = []
    forward = VisionTransformer.forward

    def listening(self: VisionTransformer, pixel_values: Tensor, patches_kept: Tensor | None = None) -> Tensor:
        if self.training:
            seen.extend(pixel_values)
        return forward(self, pixel_values, patches_kept)

    monkeypatch.setattr(VisionTransformer, "forward", listening)
    train(recipe_for(shapes, tmp_path / "out", optim={"epochs": 1}, augment={"rotate_degrees": 0, "translate": 0}))
    served = torch.stack([torch.from_numpy(preprocess_image(one, 32)) for one in shape_pairs().images.values()])
    nearest = [(served - one).abs().amax(dim=(1, 2, 3)).min(dim=0) for one in seen]
    assert max(one.values.item() for one in nearest) <= 1e-6
    assert sorted(one.indices.item() for one in nearest) == list(range(20))
