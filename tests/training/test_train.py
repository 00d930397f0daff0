"""A real run on 20 coloured shapes: it learns, it leaves what it promises, and it can be repeated."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import shape_pairs, write_pairs
from training.loss import contrastive_loss
from training.recipe import OptimSection, Recipe
from training.train import Progress, TrainingDiverged, build_optimizer, learning_rate, train
from tuwen.checkpoint import load_checkpoint, save_checkpoint
from tuwen.data.pairs import open_pairs
from tuwen.embed import score_retrieval
from tuwen.errors import InvalidInput
from tuwen.image_transform import preprocess_image
from tuwen.model import MAX_LOGIT_SCALE, ChineseCLIP
from tuwen.specs import SPECS

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
        "run": {"out": out},
    }
    for section, values in changes.items():
        sections[section] |= values
    return Recipe.model_validate(sections)


def records_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in out.with_name(f"{out.name}.metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Run:
    """A finished run, and what its progress bar heard."""

    recipe: Recipe
    out: Path
    progress: list[Progress]


@pytest.fixture(scope="module")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """20 epochs of the small ResNet, which learns fast; the shorter runs below are of the small ViT."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, "Small-RN", SMALL_SPECS["resnet"])
        recipe = recipe_for(
            shapes,
            tmp_path_factory.mktemp("run") / "shapes",
            "Small-RN",
            data={"captions_per_image": 1},
            optim={"epochs": 20},
            run={"eval_every_epochs": 5},
        )
        progress: list[Progress] = []
        return Run(recipe, train(recipe, progress.append), progress)


def test_it_learns(finished: Run) -> None:
    """Over 6 seeds the loss fell to 0.28..0.51 of what it was, and recall@10 of 20 pictures rose to 0.92..1.00."""
    losses = [progress.loss for progress in finished.progress]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert records_of(finished.out)[-1]["valid_text_to_image_r10"] > 0.7


def test_metrics_have_a_record_for_each_validation(finished: Run) -> None:
    """Epoch, step, loss and both recalls, which are those of the saved weights (in half precision)."""
    records = records_of(finished.out)
    assert [(record["epoch"], record["step"]) for record in records] == [(5, 10), (10, 20), (15, 30), (20, 40)]
    assert records[0].keys() == {
        "epoch", "step", "loss", "elapsed_s", "valid_text_to_image_r10", "valid_image_to_text_r10"
    }  # fmt: skip
    losses = [progress.loss for progress in finished.progress]
    assert records[1]["loss"] == pytest.approx((losses[18] + losses[19]) / 2, abs=1e-4)  # of the tenth epoch
    scores = score_retrieval(load_checkpoint(finished.out), open_pairs(finished.recipe.data.path, "valid"))
    # One text of 25 may change sides where fp16 decides a near tie.
    assert records[-1]["valid_text_to_image_r10"] == pytest.approx(scores["text_to_image"].r10, abs=0.05)
    assert records[-1]["valid_image_to_text_r10"] == pytest.approx(scores["image_to_text"].r10, abs=0.05)


def test_the_folder_is_a_checkpoint(finished: Run) -> None:
    """It loads as the recipe's architecture, with finite weights and nothing else beside them."""
    model = load_checkpoint(finished.out)
    assert model.spec == SPECS[finished.recipe.model.architecture]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert sorted(path.name for path in finished.out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in finished.out.parent.iterdir()) == ["shapes", "shapes.metrics.jsonl"]


def test_the_model_card_tells_recall_and_recipe(finished: Run) -> None:
    """The last record's figures, and a recipe that reads back as the one that ran."""
    card, last = (finished.out / "README.md").read_text(encoding="utf-8"), records_of(finished.out)[-1]
    assert card.startswith(f"# {finished.recipe.model.architecture}")
    assert f"| validation recall@10, text to image | {last['valid_text_to_image_r10']:.1%} |" in card
    assert f"| validation recall@10, image to text | {last['valid_image_to_text_r10']:.1%} |" in card
    assert "| epochs | 20 of 20, 40 steps of 10 pictures |" in card
    block = re.search(r"```json\n(.*)```", card, re.DOTALL)
    assert block is not None
    assert Recipe.model_validate_json(block.group(1)) == finished.recipe


def test_progress_is_told_at_every_step(finished: Run) -> None:
    """And the recall once there is one."""
    assert [(progress.step, progress.num_steps) for progress in finished.progress] == [(n, 40) for n in range(1, 41)]
    assert math.isnan(finished.progress[9].recall_at_10)
    assert finished.progress[10].recall_at_10 == pytest.approx(
        records_of(finished.out)[0]["valid_text_to_image_r10"], abs=1e-4
    )


def test_the_same_seed_gives_the_same_weights(shapes: Path, tmp_path: Path) -> None:
    """Bit for bit, dropout and augmentation included; another seed gives others."""
    weights = []
    for name, seed in (("one", 5), ("other", 5), ("third", 6)):
        torch.rand(3)  # whatever was drawn before does not matter
        recipe = recipe_for(shapes, tmp_path / name, optim={"epochs": 1}, run={"seed": seed})
        weights.append((train(recipe) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_validation_can_be_rarer(shapes: Path, tmp_path: Path) -> None:
    """Every second epoch, and the last in any case."""
    out = train(recipe_for(shapes, tmp_path / "rare", run={"eval_every_epochs": 2}))
    assert [record["epoch"] for record in records_of(out)] == [2, 3]


def test_a_second_run_starts_its_metrics_anew(shapes: Path, tmp_path: Path) -> None:
    """Two runs into one folder leave the records of the second alone."""
    for _ in range(2):
        out = train(recipe_for(shapes, tmp_path / "twice", optim={"epochs": 1}))
    assert len(records_of(out)) == 1


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


# --- what goes wrong ----------------------------------------------------------------------------------------------


def break_step(monkeypatch: pytest.MonkeyPatch, number: int, factor: float) -> None:
    """Multiply the loss of one step."""
    calls = 0

    def broken(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, positives: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss = contrastive_loss(image_embeds, text_embeds, scale, positives)
        return loss * factor if calls == number else loss

    monkeypatch.setattr("training.train.contrastive_loss", broken)


def test_a_loss_that_is_not_a_number_ends_the_run(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the step; what the validation before it saved is still there and good."""
    expected = train(recipe_for(shapes, tmp_path / "good", optim={"epochs": 1, "lr": 1e-12}))
    break_step(monkeypatch, 3, math.nan)
    recipe = recipe_for(shapes, tmp_path / "bad", optim={"lr": 1e-12})
    with pytest.raises(TrainingDiverged, match=r"loss is nan.* step 3 \(epoch 2\); the last good weights are in .*bad"):
        train(recipe)
    assert (tmp_path / "bad" / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert len(records_of(tmp_path / "bad")) == 1


def test_a_gradient_that_overflows_is_never_saved(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At an epoch's last step no later loss would tell; and nothing claims weights that were not saved."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, loss: Tensor) -> Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            return grads[0] * math.inf

    def overflowing(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, positives: Tensor) -> Tensor:
        return Overflow.apply(contrastive_loss(image_embeds, text_embeds, scale, positives))

    monkeypatch.setattr("training.train.contrastive_loss", overflowing)
    recipe = recipe_for(shapes, tmp_path / "overflow", optim={"batch_size": 20, "epochs": 1})
    with pytest.raises(TrainingDiverged, match=r"gradient's norm nan, at step 1 \(epoch 1\); no weights were saved"):
        train(recipe)
    assert not (tmp_path / "overflow").exists()


def test_a_context_longer_than_the_positions_is_refused(shapes: Path, tmp_path: Path) -> None:
    """Before anything runs, with both numbers."""
    with pytest.raises(InvalidInput, match=r"^data\.context_length 65: Small-ViT has 64 positions$"):
        train(recipe_for(shapes, tmp_path / "long", data={"context_length": 65}))


def test_a_missing_split_is_refused_before_training(shapes: Path, tmp_path: Path) -> None:
    """Also the validation split, which is first read an epoch later."""
    with pytest.raises(InvalidInput, match="no split 'test'"):
        train(recipe_for(shapes, tmp_path / "out", data={"valid_split": "test"}))
    assert not list(tmp_path.iterdir())


# --- the parts ----------------------------------------------------------------------------------------------------


def optim(**values: object) -> OptimSection:
    return OptimSection.model_validate({"epochs": 1, "batch_size": 2, "lr": 0.1} | values)


def test_the_schedule_warms_up_and_follows_a_cosine() -> None:
    """Linear to the peak in warmup_steps, half of it in the middle of the rest, nearly 0 at the end."""
    section = optim(warmup_steps=4)
    rates = [learning_rate(step, 104, section) for step in range(104)]
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[54] == pytest.approx(0.05)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert 0 < rates[-1] < 1e-4
    assert learning_rate(0, 10, optim(warmup_steps=0)) == 0.1


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    """It never reaches the peak, and divides by nothing."""
    rates = [learning_rate(step, 3, optim(warmup_steps=10)) for step in range(3)]
    assert rates == pytest.approx([0.01, 0.02, 0.03])


@pytest.mark.parametrize("name", sorted(SMALL_SPECS))
def test_only_matrices_decay(name: str) -> None:
    """Every parameter is in exactly one group; gains, biases and logit_scale in the one without decay."""
    model = ChineseCLIP(SMALL_SPECS[name])
    decayed, kept = build_optimizer(model, optim(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in (decayed, kept)]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == set(names.values())
    assert "logit_scale" in groups[1]
    assert "text_projection" in groups[0]
    assert not [name for name in groups[0] if name.endswith("bias") or "LayerNorm" in name or ".bn" in name]


def test_logit_scale_stays_below_its_limit(shapes: Path, tmp_path: Path) -> None:
    """ln 100, however hard the optimizer pushes."""
    model = random_model(SMALL_SPECS["vit"])
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    save_checkpoint(model, tmp_path / "first")
    recipe = recipe_for(
        shapes, tmp_path / "out", model={"init_checkpoint": tmp_path / "first"}, optim={"epochs": 1, "lr": 1e-9}
    )
    scale = load_checkpoint(train(recipe)).logit_scale.item()
    assert scale == pytest.approx(MAX_LOGIT_SCALE, abs=2e-3)  # fp16 keeps 4.605 to 0.002


def test_the_schedule_is_the_optimizers(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate of 0 at every step nothing is learned, whatever the recipe's lr."""
    asked: list[tuple[int, int]] = []

    def nothing(step: int, num_steps: int, section: OptimSection) -> float:
        asked.append((step, num_steps))
        return 0.0

    monkeypatch.setattr("training.train.learning_rate", nothing)
    save_checkpoint(random_model(SMALL_SPECS["vit"]), tmp_path / "first")
    recipe = recipe_for(shapes, tmp_path / "out", model={"init_checkpoint": tmp_path / "first"}, optim={"lr": 0.1})
    trained = load_checkpoint(train(recipe)).state_dict()
    assert list(dict.fromkeys(asked)) == [(step, 6) for step in range(6)]  # both groups ask
    for key, value in load_checkpoint(tmp_path / "first").state_dict().items():
        assert torch.equal(trained[key], value), key


def test_training_sees_what_serving_sees(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without augmentation the image tower is given preprocess_image's pixel_values, to float32's rounding."""
    seen: list[Tensor] = []
    encode_image = ChineseCLIP.encode_image

    def listening(self: ChineseCLIP, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        if self.training:
            seen.extend(pixel_values)
        return encode_image(self, pixel_values, normalize)

    monkeypatch.setattr(ChineseCLIP, "encode_image", listening)
    train(recipe_for(shapes, tmp_path / "out", optim={"epochs": 1}, augment={"rotate_degrees": 0, "translate": 0}))
    served = torch.stack([torch.from_numpy(preprocess_image(one, 32)) for one in shape_pairs().images.values()])
    nearest = [(served - one).abs().amax(dim=(1, 2, 3)).min(dim=0) for one in seen]
    # The bilinear lookup at the pixels' own places costs up to 1e-5 in [0, 1], four times that after dividing by std.
    assert max(one.values.item() for one in nearest) <= 5e-5
    assert sorted(one.indices.item() for one in nearest) == list(range(20))
