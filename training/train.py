"""Train Chinese-CLIP from a recipe: pairs -> a checkpoint folder, with metrics.jsonl and what to resume from in it.

tuwen train training/recipes/muge.toml --set run.out=runs/mine
torchrun --nproc-per-node 8 -m training training/recipes/muge.toml
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from training.augment import augment
from training.batch import Batches
from training.dataset import IndexedBatches
from training.distributed import World, joined
from training.feature_loss import FeatureLoss
from training.init import freeze, initial_model, keep_frozen_in_eval
from training.loader import Loader
from training.metrics import StepRecord, ValidationRecord, Watcher
from training.model_card import write_model_card
from training.optim import Ema, build_optimizer, learning_rate, set_learning_rate
from training.recipe import Recipe
from training.shards import ShardBatches
from training.state import (
    State,
    load_state,
    newest_state,
    put_optimizer,
    put_weights,
    remove_states,
    save_state,
    whole_optimizer,
    whole_weights,
)
from training.step import Step, StepResult
from training.stopping import Stop
from training.towers import Engine, Towers
from training.validation import Validation
from tuwen.checkpoint import write_checkpoint
from tuwen.errors import InvalidInput, TuwenError
from tuwen.model import ChineseCLIP

log = logging.getLogger(__name__)

Resume = Literal["auto", "never"] | Path
# A loss so many times that of guessing has no way back.
_EXPLODED = 4.0


class TrainingDiverged(TuwenError):
    """The loss or its gradient became NaN or infinite, or the loss exploded; no such weights are ever saved."""


class Stopped(Exception):
    """The run was asked to stop, and its state is on disk."""


def train(recipe: Recipe, resume: Resume = "auto", watch: Callable[[int], Watcher] | None = None) -> Path:
    """Run the recipe, or go on with it; returns the checkpoint folder, `run.out`.

    Every process of a distributed run calls this, with the same recipe.

    Args:
        resume: "auto" goes on from the newest state in run.out, if there is one; "never" begins anew and removes what
            is there; a path goes on from that state.
        watch: makes what is told of the run, in the first process, from the step it goes on from.
    Raises:
        InvalidInput: the recipe's data or first checkpoint cannot be used, or the state is another recipe's.
        TrainingDiverged: the loss became NaN or infinite, or exploded.
        Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    with joined(recipe.engine.device) as world, Stop() as stop:
        run = Run(recipe, world, stop)
        run.begin(resume)
        watcher = watch(run.step) if watch is not None and world.is_first else None
        try:
            run.go(watcher)
        finally:
            if watcher is not None:
                watcher.close()
    return recipe.run.out


class Run:
    """One process's part of a run."""

    def __init__(self, recipe: Recipe, world: World, stop: Stop) -> None:
        if recipe.optim.batch_size % world.size:
            raise InvalidInput(
                f"optim.batch_size {recipe.optim.batch_size} is not a multiple of {world.size}, the number of processes"
            )
        for warning in recipe.warnings if world.is_first else ():
            log.warning("%s", warning)
        torch.manual_seed(recipe.run.seed)
        self.recipe, self.world, self._stop = recipe, world, stop
        self.model = initial_model(recipe.model).to(world.device)
        # channels_last makes the convolutions a quarter faster on CPU, and is what GPUs want too.
        self.model.visual = self.model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        freeze(self.model, recipe.model)
        self._batches = open_batches(recipe, world, self.model)
        self.num_steps = recipe.optim.max_steps or (recipe.optim.epochs or 0) * len(self._batches)
        self._towers = Towers(self.model, recipe.model.mask_ratio)
        self._engine = Engine(self._towers, recipe.engine, world)
        self._loss = FeatureLoss(recipe, world, self.model).to(world.device)
        self._optimizer = build_optimizer(self.model, recipe, [self._loss])
        self._take_step = Step(recipe, world, self._engine, self._loss, self._optimizer)
        self._ema = Ema(self.model, recipe.optim.ema_decay) if recipe.optim.ema_decay else None
        self._validation = Validation(recipe) if recipe.valid_path and world.is_first else None
        self.step, self._trained_s = 0, 0.0
        self._last: ValidationRecord | None = None
        self._best = -math.inf
        self._kept = "no weights were saved yet"
        self._validated_at = self._saved_at = -1

    # --- beginning and going on -----------------------------------------------------------------------------

    def begin(self, resume: Resume) -> None:
        """Put the weights and all else where a state left them, or where a new run has them."""
        out = self.recipe.run.out
        folder = resume if isinstance(resume, Path) else newest_state(out) if resume == "auto" else None
        if folder is None:
            if self.world.is_first:
                out.mkdir(parents=True, exist_ok=True)
                remove_states(out)
            self._loss.start()
            self.world.barrier()
            return
        state = load_state(folder, self.recipe)
        is_sharded = self._engine.is_sharded
        put_weights(self.model, state.weights, is_sharded)
        put_optimizer(self._parts(), self._optimizer, state.rest["optimizer"], is_sharded)
        self._loss.load_state_dict(state.rest["loss"])
        self._take_step.scaler.load_state_dict(state.rest["scaler"])
        if self._ema is not None:
            self._ema.load_state_dict(state.rest["ema"])
        self.step, self._trained_s, self._best = state.step, state.rest["trained_s"], state.rest["best"]
        self._kept = f"the last good state is {folder}"
        self._saved_at = state.step
        log.info("goes on from %s", folder)

    def _parts(self) -> nn.Module:
        """All that the optimizer trains, as one module."""
        return nn.ModuleDict({"towers": self._towers, "loss": self._loss})

    # --- the loop -------------------------------------------------------------------------------------------

    def go(self, watcher: Watcher | None) -> None:
        """From the step the run is at to its last."""
        per_epoch = len(self._batches)
        loader = Loader(self._batches, self.recipe.data, start=divmod(self.step, per_epoch))
        started, self._watcher = time.monotonic() - self._trained_s, watcher
        with loader as batches:
            while self.step < self.num_steps:
                began = time.monotonic()
                batch = next(batches)
                waited_s = time.monotonic() - began
                self.model.train()
                keep_frozen_in_eval(self.model, self.recipe.model)
                lr = learning_rate(self.step, self.num_steps, self.recipe)
                set_learning_rate(self._optimizer, lr)
                result = self._take_step(batch)
                self.step += 1
                self._check(result, batch.image_ids)
                if self._ema is not None:
                    self._ema.update(self.model)
                self._trained_s = time.monotonic() - started
                if watcher is not None:
                    watcher.on_step(self._record(result, lr, time.monotonic() - began, waited_s, per_epoch))
                self._after_step(per_epoch)
        self._finish()

    def _after_step(self, per_epoch: int) -> None:
        valid, run = self.recipe.valid, self.recipe.run
        if self._is_due(valid.every_steps, valid.every_epochs, per_epoch):
            self._validate()
        is_stopped = self._stop.is_asked_for(self.world)
        if is_stopped or self._is_due(run.save_every_steps, run.save_every_epochs, per_epoch):
            self._save()
        if is_stopped and self.step < self.num_steps:
            raise Stopped(f"stopped after step {self.step} of {self.num_steps}; {self._kept}")

    def _is_due(self, every_steps: int, every_epochs: int, per_epoch: int) -> bool:
        by_steps = every_steps and self.step % every_steps == 0
        by_epochs = every_epochs and self.step % (every_epochs * per_epoch) == 0
        return bool(by_steps or by_epochs)

    def _finish(self) -> None:
        if self._validated_at != self.step:
            self._validate()
        if self._saved_at != self.step:
            self._save()
        self.world.barrier()

    def _check(self, result: StepResult, image_ids: tuple[int, ...]) -> None:
        """Stop before such weights are saved."""
        loss, chance = result.losses.total, math.log(self.recipe.optim.batch_size)
        overflowed = not math.isfinite(result.grad_norm) and not self._take_step.scaler.is_enabled()
        if math.isfinite(loss) and not overflowed and not self._has_exploded(loss, chance):
            return
        shown = ", ".join(map(str, image_ids[:8])) + (", ..." if len(image_ids) > 8 else "")
        what = "exploded to" if math.isfinite(loss) and not overflowed else "is"
        raise TrainingDiverged(
            f"the loss {what} {loss:g}, its gradient's norm {result.grad_norm:g}, at step {self.step} "
            f"(epoch {self._epoch(self.step - 1)}, pictures {shown}); {self._kept}"
        )

    def _has_exploded(self, loss: float, chance: float) -> bool:
        return self.recipe.loss.kind == "contrastive" and loss > _EXPLODED * max(chance, self._first_loss(loss))

    def _first_loss(self, loss: float) -> float:
        self._first = getattr(self, "_first", loss)
        return self._first

    def _epoch(self, step: int) -> int:
        """That a step (from 0) belongs to, from 1."""
        return step // len(self._batches) + 1

    def _record(self, result: StepResult, lr: float, took_s: float, waited_s: float, per_epoch: int) -> StepRecord:
        return StepRecord(
            step=self.step,
            num_steps=self.num_steps,
            epoch=self._epoch(self.step - 1),
            loss=result.losses.total,
            distillation_loss=result.losses.distillation,
            lr=lr,
            grad_norm=result.grad_norm,
            logit_scale=float(self.model.logit_scale.exp()),
            samples_per_s=self.recipe.optim.batch_size / took_s,
            data_wait_s=waited_s,
            num_unreadable=result.num_unreadable,
            image_accuracy=result.losses.image_accuracy,
            text_accuracy=result.losses.text_accuracy,
        )

    # --- validating and saving ------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Validate in the first process, and keep the result; a sharded model is put together there."""
        self._validated_at = self.step
        with self._result_weights() as model:
            if self._validation is not None and model is not None:
                self._last = self._validation(model, self.step, self._epoch(self.step - 1))
                if self._watcher is not None:
                    self._watcher.on_validation(self._last)
            is_best = self._last is None or self._last.mean_recall > self._best
            if self._last is not None:
                self._best = max(self._best, self._last.mean_recall)
            if model is not None and (is_best or not self.recipe.run.keep_best):
                card = write_model_card(self.recipe, self._summary(), self._last)
                write_checkpoint(self.recipe.run.out, model.spec, model.state_dict(), card)
        self.world.barrier()

    @contextmanager
    def _result_weights(self) -> Iterator[ChineseCLIP | None]:
        """The model that is the result, averaged if the recipe says so, in eval mode; None in other processes."""
        with self._ema.applied(self.model) if self._ema is not None else nullcontext():
            if not self._engine.is_sharded:
                self.model.eval()
                yield self.model if self.world.is_first else None
                return
            weights = whole_weights(self.model, is_sharded=True)
            whole = None
            if self.world.is_first:
                whole = ChineseCLIP(self.model.spec).eval()
                whole.load_state_dict(weights)
            yield whole.to(self.world.device) if whole is not None else None

    def _save(self) -> None:
        """Write a state to go on from; all processes call it."""
        is_sharded = self._engine.is_sharded
        weights = whole_weights(self.model, is_sharded)
        rest: dict[str, Any] = {
            "optimizer": whole_optimizer(self._parts(), self._optimizer, is_sharded),
            "loss": self._loss.state_dict(),
            "scaler": self._take_step.scaler.state_dict(),
            "ema": self._ema.state_dict() if self._ema is not None else None,
            "trained_s": self._trained_s,
            "best": self._best,
        }
        if self.world.is_first:
            card = write_model_card(self.recipe, self._summary(), self._last)
            state = State(self.step, weights, rest)
            folder = save_state(
                self.recipe.run.out, state, self.recipe, self.model.spec, card, self.recipe.run.keep_last
            )
            self._kept = f"the last good state is {folder}"
        self._saved_at = self.step
        self._kept = self.world.share_object(self._kept)

    def _summary(self) -> Any:
        raise NotImplementedError


def open_batches(recipe: Recipe, world: World, model: ChineseCLIP) -> Batches:
    """The training data of this process."""
    raise NotImplementedError
