"""The optimizer's groups, the schedule, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.conftest import SMALL_SPECS, random_model
from training.loss import SigmoidHead
from training.optim import Ema, build_optimizer, learning_rate, set_learning_rate
from training.recipe import Recipe
from tuwen.model import ChineseCLIP

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe_of(**optim: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"architecture": "Tiny-ViT"},
            "data": {"path": Path("pairs")},
            "optim": {"epochs": 1, "batch_size": 2, "lr": 0.1} | optim,
            "run": {"out": Path("out")},
        }
    )


def groups_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """lr_scale and weight_decay of each parameter that is in a group; once each."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [
        (names.get(id(parameter), "of a head"), (group["lr_scale"], group["weight_decay"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(listed) == len({name for name, _ in listed})
    return dict(listed)


@pytest.mark.parametrize("name", sorted(SMALL_SPECS))
def test_only_matrices_decay(name: str) -> None:
    """Every parameter is in exactly one group; gains, biases and logit_scale in the one without decay."""
    model = ChineseCLIP(SMALL_SPECS[name])
    groups = groups_by_name(build_optimizer(model, recipe_of(weight_decay=0.3)), model)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert {lr_scale for lr_scale, _ in groups.values()} == {1.0}
    decayed = {name for name, (_, weight_decay) in groups.items() if weight_decay == 0.3}
    assert {weight_decay for name, (_, weight_decay) in groups.items() if name not in decayed} == {0.0}
    assert {"text_projection", "bert.embeddings.word_embeddings.weight", "visual.conv1.weight"} <= decayed
    assert not [name for name in decayed if name.endswith("bias") or "LayerNorm" in name or ".bn" in name]
    assert "logit_scale" not in decayed


def test_frozen_weights_are_left_out() -> None:
    """They would be decayed all the same."""
    model = ChineseCLIP(SMALL_SPECS["vit"])
    model.visual.requires_grad_(False)
    groups = groups_by_name(build_optimizer(model, recipe_of()), model)
    assert groups.keys() == {name for name, _ in model.named_parameters() if not name.startswith("visual.")}


def test_heads_are_trained_along() -> None:
    """At the full rate, a bias without decay."""
    model, head = ChineseCLIP(SMALL_SPECS["vit"]), SigmoidHead()
    groups = groups_by_name(build_optimizer(model, recipe_of(layer_decay=0.5), [head]), model)
    assert groups["of a head"] == (1.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "vit",
            {
                0: ["logit_scale", "text_projection", "visual.proj", "visual.ln_post.bias"],
                1: ["visual.transformer.resblocks.1.mlp.c_fc.weight", "bert.encoder.layer.1.output.dense.bias"],
                2: ["visual.transformer.resblocks.0.ln_1.weight", "bert.encoder.layer.0.attention.self.query.weight"],
                3: [
                    "visual.conv1.weight",
                    "visual.class_embedding",
                    "visual.positional_embedding",
                    "visual.ln_pre.weight",
                    "bert.embeddings.word_embeddings.weight",
                    "bert.embeddings.LayerNorm.bias",
                ],
            },
        ),
        (
            "resnet",
            {
                0: ["visual.attnpool.c_proj.weight", "visual.attnpool.positional_embedding", "text_projection"],
                1: ["visual.layer4.0.conv1.weight", "visual.layer4.0.downsample.0.weight"],
                4: ["visual.layer1.0.bn3.bias"],
                5: ["visual.conv1.weight", "visual.conv3.weight", "visual.bn2.weight"],
            },
        ),
    ],
)
def test_layers_have_their_rates(kind: str, expected: dict[int, list[str]]) -> None:
    """Each layer half of the one above it, from the projections down to the embeddings."""
    model = ChineseCLIP(SMALL_SPECS[kind])
    groups = groups_by_name(build_optimizer(model, recipe_of(layer_decay=0.5)), model)
    for layers_above, names in expected.items():
        assert {name: groups[name][0] for name in names} == dict.fromkeys(names, 0.5**layers_above)
    assert min(lr_scale for lr_scale, _ in groups.values()) == 0.5 ** max(expected)


def test_a_step_moves_each_layer_by_its_rate() -> None:
    """AdamW's first step is lr times the gradient's sign, whatever its size."""
    model = random_model(SMALL_SPECS["vit"])
    optimizer = build_optimizer(model, recipe_of(layer_decay=0.5, weight_decay=0, eps=1e-12))
    set_learning_rate(optimizer, 0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, layers_above in (("text_projection", 0), ("visual.conv1.weight", 3)):
        moved = before[name] - model.get_parameter(name)
        # float32 weights of up to 1 are exact to 6e-8.
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * 0.5**layers_above), rtol=1e-3, atol=2e-7)


def test_the_schedule_warms_up_and_follows_a_cosine() -> None:
    """Linear to the peak in warmup_steps, half of it in the middle of the rest, nearly 0 at the end."""
    recipe = recipe_of(warmup_steps=4)
    rates = [learning_rate(step, 104, recipe) for step in range(104)]
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[54] == pytest.approx(0.05)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert 0 < rates[-1] < 1e-4
    assert learning_rate(0, 10, recipe_of(warmup_steps=0)) == 0.1


def test_the_schedule_can_be_constant() -> None:
    """After its warm-up."""
    recipe = recipe_of(warmup_steps=2, schedule="constant")
    assert [learning_rate(step, 5, recipe) for step in range(5)] == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1])


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    """It never reaches the peak, and divides by nothing."""
    rates = [learning_rate(step, 3, recipe_of(warmup_steps=10)) for step in range(3)]
    assert rates == pytest.approx([0.01, 0.02, 0.03])


# --- the moving average -------------------------------------------------------------------------------------------


class Line(nn.Module):
    """One weight and a batch norm, whose statistics are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0]))
        self.norm = nn.BatchNorm1d(1)

    def go_to(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
        self.norm.running_mean.fill_(value)  # type: ignore[union-attr,operator]
        self.norm.num_batches_tracked.fill_(int(value))  # type: ignore[union-attr,operator]


def follow(ema: Ema, model: Line, values: list[float]) -> None:
    for value in values:
        model.go_to(value)
        ema.update(model)


def averaged_weight(ema: Ema, model: Line) -> float:
    with ema.applied(model):
        return model.weight.item()


def fail_within(ema: Ema, model: Line) -> None:
    with ema.applied(model):
        model.go_to(77.0)
        raise ZeroDivisionError


def test_the_average_follows_the_weights() -> None:
    """Its decay is (1 + n) / (10 + n) until that exceeds the recipe's."""
    model = Line()
    ema = Ema(model, decay=0.25)
    expected, decays = 0.0, [1 / 10, 2 / 11, 3 / 12, 0.25, 0.25]
    for value, decay in zip([10.0, 20.0, 30.0, 40.0, 50.0], decays, strict=True):
        follow(ema, model, [value])
        expected = decay * expected + (1 - decay) * value
        assert averaged_weight(ema, model) == pytest.approx(expected, rel=1e-6)


def test_buffers_are_the_models_own() -> None:
    """Batch norm averages over steps already; a count is no number to average."""
    model = Line()
    ema = Ema(model, decay=0.9)
    follow(ema, model, [4.0, 8.0])
    model.go_to(9.0)
    with ema.applied(model):
        assert model.norm.running_mean is not None
        assert model.norm.num_batches_tracked is not None
        assert (model.norm.running_mean.item(), model.norm.num_batches_tracked.item()) == (8.0, 8)


def test_the_model_gets_its_own_weights_back() -> None:
    """Bit for bit, also when the block fails; and the average is not changed by what is done within."""
    model = Line()
    ema = Ema(model, decay=0.9)
    follow(ema, model, [1.0, 2.0])
    model.go_to(1 / 3)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    before = averaged_weight(ema, model)
    with pytest.raises(ZeroDivisionError):
        fail_within(ema, model)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert averaged_weight(ema, model) == before


def test_the_average_resumes() -> None:
    """Saved and loaded into a fresh one half-way, it ends the same to the bit."""
    model = Line()
    through = Ema(model, decay=0.6)
    follow(through, model, [1.0, 5.0, 2.0, 8.0, 3.0, 1 / 3])
    first, second = Ema(Line(), decay=0.6), Ema(Line(), decay=0.6)
    follow(first, model, [1.0, 5.0, 2.0])
    second.load_state_dict(first.state_dict())
    follow(first, model, [math.pi])  # goes its own way: nothing is shared
    follow(second, model, [8.0, 3.0, 1 / 3])
    assert averaged_weight(second, model) == averaged_weight(through, model)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_sharded_weights_are_averaged_and_stepped() -> None:
    """FSDP2's parameters are DTensors: the same optimizer and average take them, and end where plain ones do."""
    ends = []
    for is_sharded in (False, True):
        model = random_model(SMALL_SPECS["vit"])
        if is_sharded:
            # FSDP2 shards no scalar: logit_scale stays a plain tensor beside them.
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params={model.logit_scale})
            assert isinstance(model.text_projection, DTensor)
        head = nn.Linear(3, 4)  # plain, as its kind are
        head.weight.grad = torch.ones_like(head.weight)
        optimizer, ema = build_optimizer(model, recipe_of(lr=0.01), [head]), Ema(model, decay=0.5)
        for _ in range(3):
            image_embeds, text_embeds, scale = model(torch.ones(2, 3, 32, 32), torch.tensor([[101, 7, 102]]))
            (scale * image_embeds @ text_embeds.t()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
        ema.load_state_dict(ema.state_dict())
        with ema.applied(model):
            ends.append([whole(value).clone() for value in model.state_dict().values()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
