"""One step on a made-up global batch, by any number of processes; run under torchrun it writes what came of it.

torchrun --nproc-per-node 2 -m tests.training.one_step OUT.pt engine.strategy=fsdp optim.chunk_size=2
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tests.conftest import SMALL_SPECS, random_model
from training.batch import Batch, Positives
from training.distributed import World, joined
from training.feature_loss import FeatureLoss
from training.recipe import Recipe
from training.state import whole_weights
from training.step import Step
from training.towers import Engine, Towers
from tuwen.model import ChineseCLIP

NUM_IMAGES, NUM_TEXTS = 8, 11


@dataclass(frozen=True)
class Outcome:
    """The global loss, the gradient's norm, and each parameter's gradient."""

    loss: float
    grad_norm: float
    accuracy: float
    gradients: dict[str, Tensor]


def recipe_of(overrides: list[str]) -> Recipe:
    values: dict[str, dict[str, object]] = {
        "model": {"architecture": "Tiny-ViT"},
        "data": {"path": "unused"},
        "optim": {"epochs": 1, "batch_size": NUM_IMAGES, "max_grad_norm": 1e9},
        "run": {"out": "unused", "report_batch_accuracy": True},
    }
    for override in overrides:
        key, value = override.split("=")
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return Recipe.model_validate(values)


def small_model(dropout: float = 0.0, kind: str = "vit") -> ChineseCLIP:
    spec = SMALL_SPECS[kind]
    return random_model(replace(spec, text=replace(spec.text, dropout=dropout))).train()


def global_batch(world: World, resolution: int = 32) -> Batch:
    """A process's share: captions that several pictures share, of several lengths, and a picture that is unreadable."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (NUM_IMAGES, 3, resolution, resolution), generator=generator, dtype=torch.uint8)
    texts = [(101, *range(200 + 9 * index, 201 + 9 * index + index % 5), 102) for index in range(NUM_TEXTS)]
    positives = torch.zeros(NUM_IMAGES, NUM_TEXTS, dtype=torch.bool)
    for index in range(NUM_TEXTS):
        positives[index % NUM_IMAGES, index] = True
    positives[1, 8] = True
    is_readable = torch.arange(NUM_IMAGES) != 5
    images, captions = world.share(NUM_IMAGES), world.share(NUM_TEXTS)
    return Batch(
        epoch=0,
        number=0,
        image_ids=tuple(range(NUM_IMAGES))[images],
        pixels=pixels[images],
        is_readable=is_readable[images],
        texts=tuple(texts[captions]),
        positives=Positives(positives[images], positives.t()[captions]),
    )


def take(recipe: Recipe, world: World, model: ChineseCLIP, resolution: int = 32) -> Outcome:
    """Gradients told from what plain descent at rate 1 does to the weights."""
    engine = Engine(Towers(model, recipe.model.mask_ratio), recipe.engine, world)
    loss = FeatureLoss(recipe, world, model)
    optimizer = torch.optim.SGD([*engine.towers.parameters(), *loss.parameters()], lr=1.0)
    # float64 would be the way to tell gradients from differences, but is not what training computes in.
    before = {key: value.clone() for key, value in whole_weights(model, engine.is_sharded).items()}
    result = Step(recipe, world, engine, loss, optimizer)(global_batch(world, resolution))
    after = whole_weights(model, engine.is_sharded)
    gradients = {key: before[key] - after[key] for key in before if before[key].is_floating_point() and after}
    return Outcome(result.losses.total, result.grad_norm, result.losses.image_accuracy, gradients)


def main() -> None:
    out, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    recipe = recipe_of(overrides)
    with joined("cpu") as world:
        outcome = take(recipe, world, small_model())
        if world.is_first:
            torch.save(vars(outcome), Path(out))


if __name__ == "__main__":
    main()
