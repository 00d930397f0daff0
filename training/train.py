"""Train Chinese-CLIP from a recipe: pairs -> checkpoint folder, metrics.jsonl beside it.

tuwen train training/recipes/emoji_tiny.toml
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.augment import augment
from training.dataset import Batch, ImageBatches
from training.loss import contrastive_loss
from training.model_card import write_model_card
from training.recipe import OptimSection, Recipe
from tuwen.checkpoint import load_checkpoint, save_checkpoint
from tuwen.data.pairs import open_pairs
from tuwen.embed import score_retrieval
from tuwen.errors import InvalidInput, TuwenError
from tuwen.model import MAX_LOGIT_SCALE, ChineseCLIP, resolve_device
from tuwen.specs import IMAGE_MEAN, IMAGE_STD, get_spec

log = logging.getLogger(__name__)


class TrainingDiverged(TuwenError):
    """The loss or its gradient became NaN or infinite; the checkpoint of the last validation is on disk."""


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows: the step of how many, the last loss, the last validation recall@10."""

    step: int
    num_steps: int
    loss: float
    recall_at_10: float


def train(recipe: Recipe, on_step: Callable[[Progress], None] = lambda progress: None) -> Path:
    """Run the recipe from start to finish; returns the checkpoint folder, `run.out`.

    After every validation the folder holds the newest weights, so a kill loses at most that interval.
    Raises:
        InvalidInput: the recipe's data or first checkpoint cannot be used.
        TrainingDiverged: the loss or its gradient became NaN or infinite; no such weights are ever saved.
    """
    torch.manual_seed(recipe.run.seed)
    # channels_last makes the convolutions a quarter faster on CPU, and is what GPUs want too.
    model = _initial_model(recipe).to(resolve_device(recipe.run.device))
    model.visual = model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    valid_pairs = open_pairs(recipe.data.path, recipe.data.valid_split)
    train_pairs = open_pairs(recipe.data.path, recipe.data.train_split)
    batches = ImageBatches(train_pairs, recipe.data, model.spec.vision.resolution, recipe.optim.batch_size)
    num_steps = recipe.optim.epochs * len(batches)
    optimizer = build_optimizer(model, recipe.optim)
    generator = torch.Generator().manual_seed(recipe.run.seed)
    recipe.run.out.parent.mkdir(parents=True, exist_ok=True)
    metrics_path = recipe.run.out.with_name(recipe.run.out.name + ".metrics.jsonl")
    metrics_path.write_text("", encoding="utf-8")
    started, step, recall_at_10, saved = time.monotonic(), 0, math.nan, "no weights were saved yet"
    for epoch in range(recipe.optim.epochs):
        model.train()
        losses = []
        for batch in batches.epoch(recipe.run.seed, epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps, recipe.optim)
            step += 1
            loss, grad_norm = _step(model, batch, recipe, optimizer, generator)
            if not math.isfinite(loss + grad_norm):
                raise TrainingDiverged(
                    f"loss is {loss}, its gradient's norm {grad_norm}, at step {step} (epoch {epoch + 1}); {saved}"
                )
            losses.append(loss)
            on_step(Progress(step, num_steps, loss, recall_at_10))
        if (epoch + 1) % recipe.run.eval_every_epochs and epoch + 1 < recipe.optim.epochs:
            continue
        model.eval()
        scores = score_retrieval(model, valid_pairs)
        recall_at_10 = scores["text_to_image"].r10
        record = {
            "epoch": epoch + 1,
            "step": step,
            "loss": round(sum(losses) / len(losses), 4),
            "elapsed_s": round(time.monotonic() - started, 1),
            "valid_text_to_image_r10": round(recall_at_10, 4),
            "valid_image_to_text_r10": round(scores["image_to_text"].r10, 4),
        }
        log.info("%s", record)
        with open(metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        save_checkpoint(model, recipe.run.out, write_model_card(recipe, record))
        saved = f"the last good weights are in {recipe.run.out}"
    return recipe.run.out


def _initial_model(recipe: Recipe) -> ChineseCLIP:
    spec = get_spec(recipe.model.architecture)
    if recipe.data.context_length > spec.text.max_positions:
        raise InvalidInput(
            f"data.context_length {recipe.data.context_length}: {spec.name} has {spec.text.max_positions} positions"
        )
    if recipe.model.init_checkpoint is None:
        return ChineseCLIP(spec)
    return load_checkpoint(recipe.model.init_checkpoint, spec)


def build_optimizer(model: ChineseCLIP, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW; gains, biases and logit_scale are not decayed, as in CLIP's and Chinese-CLIP's trainers."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    kept = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)


def learning_rate(step: int, num_steps: int, optim: OptimSection) -> float:
    """Linear warm-up to `lr`, then a cosine down to 0 at `num_steps`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _step(
    model: ChineseCLIP, batch: Batch, recipe: Recipe, optimizer: torch.optim.AdamW, generator: torch.Generator
) -> tuple[float, float]:
    """One update of the weights; returns the loss and its gradient's norm before clipping."""
    device = recipe.run.device
    pixel_values = normalize(augment(batch.pixels, recipe.augment, generator))
    pixel_values = pixel_values.to(device, memory_format=torch.channels_last)
    image_embeds, text_embeds, scale = model(pixel_values, batch.input_ids.to(device))
    loss = contrastive_loss(image_embeds, text_embeds, scale, batch.positives.to(device))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    return float(loss.detach()), float(grad_norm)


def normalize(pixels: Tensor) -> Tensor:
    """pixel_values of float32 pixels (B, 3, R, R) in [0, 1]: CLIP's mean and std."""
    return (pixels - torch.tensor(IMAGE_MEAN)[:, None, None]) / torch.tensor(IMAGE_STD)[:, None, None]
