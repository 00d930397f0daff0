"""Train Chinese-CLIP from a recipe: pairs -> a checkpoint folder, with metrics.jsonl and what to resume from in it.

tuwen train training/recipes/muge.toml --set run.out=runs/mine
torchrun --nproc-per-node 8 -m training training/recipes/muge.toml
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from training.augment import augment
from training.batch import Batch
from training.distill import open_teacher
from training.distributed import World, is_lost_peer, joined
from training.feature_loss import FeatureLoss
from training.init import freeze, initial_model, keep_frozen_in_eval
from training.loader import Loader, open_batches
from training.metrics import StepRecord, ValidationRecord
from training.model_card import RunSummary, render_model_card
from training.optim import Ema, build_optimizer, learning_rate, set_learning_rate
from training.recipe import AugmentSection, Recipe
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
from training.validation import open_zero_shot, validate
from training.watchers import Watcher
from tuwen.checkpoint import write_checkpoint
from tuwen.data.pairs import open_pairs
from tuwen.errors import InvalidInput, TuwenError
from tuwen.model import ChineseCLIP

log = logging.getLogger(__name__)

Resume = Literal["auto", "never"] | Path
# A loss so many times that of guessing has no way back.
_EXPLODED = 4.0
_RECENT = 50  # steps, whose mean loss and speed the model card tells


class TrainingDiverged(TuwenError):
    """The loss or its gradient became NaN or infinite, or the loss exploded; no such weights are ever saved."""


class Stopped(TuwenError):
    """The run was asked to stop, and its state is on disk."""


def train(recipe: Recipe, resume: Resume = "auto", watch: Callable[[Run], Watcher] | None = None) -> Path:
    """Run the recipe, or go on with it; returns the checkpoint folder, `run.out`.

    Every process of a distributed run calls this, with the same recipe.

    Args:
        resume: "auto" goes on from the newest state in run.out, if there is one; "never" begins anew and removes what
            is there; a path goes on from that state.
        watch: makes who is told of the run, in the first process, when it is known from which step it goes on.
    Raises:
        InvalidInput: the recipe's data or first checkpoint cannot be used, or the state is another recipe's.
        TrainingDiverged: the loss became NaN or infinite, or exploded.
        Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    with joined(recipe.engine.device) as world, Stop() as stop:
        run = Run(recipe, world, stop)
        run.begin(resume)
        watcher = watch(run) if watch is not None and world.is_first else Watcher()
        try:
            run.go(watcher)
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise TuwenError("another process of this run has ended; what it says is the reason") from None
        finally:
            watcher.close()
    return recipe.run.out


class Run:
    """One process's part of a run.

    Attributes:
        step: updates made, those before a resume among them.
        num_steps: there are in all.
    """

    def __init__(self, recipe: Recipe, world: World, stop: Stop) -> None:
        for warning in recipe.warnings if world.is_first else ():
            log.warning("%s", warning)
        if recipe.run.debug:
            log.setLevel(logging.DEBUG)
        torch.manual_seed(recipe.run.seed)
        self.recipe, self.world, self._stop, self._watcher = recipe, world, stop, Watcher()
        self.model = initial_model(recipe.model).to(world.device)
        freeze(self.model, recipe.model)
        self._batches = open_batches(
            recipe.data,
            self.model.spec.vision.resolution,
            recipe.optim.batch_size,
            recipe.run.seed,
            world.rank,
            world.size,
            partial(_augmented, recipe) if recipe.augment != AugmentSection() else None,
        )
        self._valid_pairs = open_pairs(recipe.valid_path, recipe.valid.split) if recipe.valid_path else None
        self._classes = open_zero_shot(recipe.valid.zero_shot) if recipe.valid.zero_shot else None
        self._build()
        self.num_steps = recipe.optim.max_steps or (recipe.optim.epochs or 0) * len(self._batches)
        if recipe.optim.warmup_steps >= self.num_steps and world.is_first:
            log.warning(
                "optim.warmup_steps is %d and the run has %d steps: the learning rate never reaches optim.lr",
                recipe.optim.warmup_steps,
                self.num_steps,
            )
        self.step, self._trained_s = 0, 0.0
        self._losses: deque[float] = deque(maxlen=_RECENT)
        self._rates: deque[float] = deque(maxlen=_RECENT)
        self._first_loss = math.nan
        self._validated: ValidationRecord | None = None
        self._best = -math.inf
        self._kept = "no weights were saved yet"
        self._validated_at = self._saved_at = -1

    def _build(self) -> None:
        """What trains the model. The engine wraps it first, so that the optimizer has the parameters it then has."""
        recipe, world = self.recipe, self.world
        self._towers = Towers(self.model, recipe.model.mask_ratio)
        self._engine = Engine(self._towers, recipe.engine, world)
        teacher = None
        if recipe.distill.is_on:
            teacher = open_teacher(recipe.distill, recipe.data, world.device, recipe.optim.chunk_size)
        self._loss = FeatureLoss(recipe, world, self.model, teacher).to(world.device)
        self._optimizer = build_optimizer(self.model, recipe, [self._loss])
        self._take_step = Step(recipe, world, self._engine, self._loss, self._optimizer)
        self._ema = Ema(self.model, recipe.optim.ema_decay) if recipe.optim.ema_decay else None

    @property
    def epoch(self) -> int:
        """Of the step made last, from 1."""
        return max(0, self.step - 1) // len(self._batches) + 1

    @property
    def num_epochs(self) -> int:
        return -(-self.num_steps // len(self._batches))

    # --- beginning and going on -----------------------------------------------------------------------------

    def begin(self, resume: Resume) -> None:
        """Put the weights and all else where a state left them, or where a new run has them."""
        out = self.recipe.run.out
        folder = resume if isinstance(resume, Path) else newest_state(out) if resume == "auto" else None
        if folder is not None:
            self._go_on_from(folder)
            return
        if self.world.is_first:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidInput(f"run.out {out}: cannot be a folder: {error.strerror}") from None
            remove_states(out)
        self._loss.start()
        self.world.barrier()

    def _go_on_from(self, folder: Path) -> None:
        state = load_state(folder, self.recipe)
        rest, is_sharded = state.rest, self._engine.is_sharded
        put_weights(self.model, state.weights, is_sharded)
        put_optimizer(self._parts(), self._optimizer, rest["optimizer"], is_sharded)
        self._loss.load_state_dict(rest["loss"])
        self._take_step.scaler.load_state_dict(rest["scaler"])
        if self._ema is not None:
            self._ema.load_state_dict(rest["ema"])
        self.step, self._trained_s = state.step, rest["trained_s"]
        self._best, self._first_loss = rest["best"], rest["first_loss"]
        self._losses.extend(rest["losses"])
        self._validated_at = rest["validated_at"]
        self._kept, self._saved_at = f"the last good state is {folder}", state.step

    def _parts(self) -> nn.Module:
        """All that the optimizer trains, as one module."""
        return nn.ModuleDict({"towers": self._towers, "loss": self._loss})

    # --- the loop -------------------------------------------------------------------------------------------

    def go(self, watcher: Watcher) -> None:
        """From the step the run is at to its last."""
        self._watcher = watcher
        if self.step:
            goes_on = self.step < self.num_steps
            watcher.on_note(f"{'goes on after' if goes_on else 'is finished:'} step {self.step} of {self.num_steps}")
        started = time.monotonic() - self._trained_s
        with Loader(self._batches, self.recipe.data, divmod(self.step, len(self._batches))) as batches:
            while self.step < self.num_steps:
                began = time.monotonic()
                batch = next(batches)
                waited_s = time.monotonic() - began
                result, lr = self._train_on(batch)
                del batch  # before the next one is made
                self._trained_s = time.monotonic() - started
                watcher.on_step(self._record(result, lr, time.monotonic() - began, waited_s, len(batches.unreadable)))
                self._after_step()
        self._finish()

    def _train_on(self, batch: Batch) -> tuple[StepResult, float]:
        self.model.train()
        keep_frozen_in_eval(self.model, self.recipe.model)
        lr = learning_rate(self.step, self.num_steps, self.recipe)
        set_learning_rate(self._optimizer, lr)
        log.debug(
            "step %d, rank %d: batch %d has pictures %s", self.step + 1, self.world.rank, batch.number, batch.image_ids
        )
        result = self._take_step(batch)
        self.step += 1
        self._check(result, batch)
        if self._ema is not None:
            self._ema.update(self.model)
        return result, lr

    def _check(self, result: StepResult, batch: Batch) -> None:
        """Stop before such weights are saved."""
        loss = result.losses.total
        self._first_loss = loss if math.isnan(self._first_loss) else self._first_loss
        self._losses.append(loss)
        is_lost = not math.isfinite(result.grad_norm) and not self._take_step.scaler.is_enabled()
        limit = _EXPLODED * max(math.log(self.recipe.optim.batch_size), self._first_loss)
        if loss <= limit and not is_lost:  # NaN is not
            return
        ids = batch.image_ids
        shown = ", ".join(map(str, ids[:8])) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise TrainingDiverged(
            f"the loss is {loss:g}, its gradient's norm {result.grad_norm:g}, at step {self.step} "
            f"(epoch {self.epoch}, batch {batch.number}, pictures {shown}); {self._kept}"
        )

    def _after_step(self) -> None:
        valid, run = self.recipe.valid, self.recipe.run
        if self._is_due(valid.every_steps, valid.every_epochs):
            self._validate()
        is_stopped = self._stop.is_asked_for(self.world)
        if is_stopped or self._is_due(run.save_every_steps, run.save_every_epochs):
            self._save()
        if is_stopped and self.step < self.num_steps:
            raise Stopped(f"stopped after step {self.step} of {self.num_steps}; {self._kept}")

    def _is_due(self, every_steps: int, every_epochs: int) -> bool:
        by_steps = every_steps and self.step % every_steps == 0
        by_epochs = every_epochs and self.step % (every_epochs * len(self._batches)) == 0
        return bool(by_steps or by_epochs)

    def _finish(self) -> None:
        if self._validated_at != self.step:
            self._validate()
        if self._saved_at != self.step:
            self._save()
        self.world.barrier()

    def _record(self, result: StepResult, lr: float, took_s: float, waited_s: float, num_unreadable: int) -> StepRecord:
        losses, scaler, reports = result.losses, self._take_step.scaler, self.recipe.run.report_batch_accuracy
        self._rates.append(self.recipe.optim.batch_size / took_s)
        return StepRecord(
            step=self.step,
            epoch=self.epoch,
            loss=losses.total,
            lr=lr,
            grad_norm=result.grad_norm,
            logit_scale=float(self.model.logit_scale.detach().exp()),
            samples_per_s=self._rates[-1],
            step_s=took_s,
            data_wait_s=waited_s,
            num_unreadable=num_unreadable,
            image_accuracy=losses.image_accuracy if reports else None,
            text_accuracy=losses.text_accuracy if reports else None,
            distill_loss=losses.distillation if self.recipe.distill.is_on else None,
            loss_scale=scaler.get_scale() if scaler.is_enabled() else None,
        )

    # --- validating and saving ------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Validate, by all processes together, and keep the result in the first."""
        self._validated_at = self.step
        with self._result_model() as model:
            is_best = True
            if self._valid_pairs is not None:
                record = validate(
                    model,
                    self.recipe,
                    self._valid_pairs,
                    self._classes,
                    self.step,
                    self.epoch,
                    self._watcher.on_activity,
                )
                is_best = record.mean_recall > self._best
                self._best, self._validated = max(self._best, record.mean_recall), record
                self._watcher.on_validation(record)
            if self.world.is_first and (is_best or not self.recipe.run.keep_best):
                card = self._card(is_best=self.recipe.run.keep_best)
                write_checkpoint(self.recipe.run.out, model.spec, model.state_dict(), card)
                self._watcher.on_checkpoint(self.step, self.recipe.run.out)
        self.world.barrier()

    @contextmanager
    def _result_model(self) -> Iterator[ChineseCLIP]:
        """The model that is the result: averaged if the recipe says so, and put together if it is sharded."""
        with self._ema.applied(self.model) if self._ema is not None else nullcontext():
            if not self._engine.is_sharded:
                yield self.model
                return
            whole = ChineseCLIP(self.model.spec).to(self.world.device)
            whole.load_state_dict(whole_weights(self.model, is_sharded=True, everywhere=True))
            yield whole

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
            "first_loss": self._first_loss,
            "losses": list(self._losses),
            "validated_at": self._validated_at,
        }
        if self.world.is_first:
            state, keep_last = State(self.step, weights, rest), self.recipe.run.keep_last
            folder = save_state(self.recipe.run.out, state, self.recipe, self.model.spec, self._card(), keep_last)
            self._kept = f"the last good state is {folder}"
            self._watcher.on_checkpoint(self.step, folder)
        self._saved_at = self.step
        self._kept = self.world.share_object(self._kept)

    def _card(self, is_best: bool = False) -> str:
        summary = RunSummary(
            step=self.step,
            num_steps=self.num_steps,
            epoch=self.epoch,
            loss=sum(self._losses) / max(1, len(self._losses)),
            elapsed_s=self._trained_s,
            samples_per_s=sum(self._rates) / max(1, len(self._rates)),
            num_processes=self.world.size,
            device_name=_device_name(self.world.device),
            validation=self._validated if self._validated_at == self.step else None,
            is_best=is_best,
        )
        return render_model_card(self.recipe, summary)


def _augmented(recipe: Recipe, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return augment(pixels, recipe.augment, generator)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
