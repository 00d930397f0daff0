"""Never lose work: what a run resumes from, `OUT/checkpoints/step_00001200`, written whole or not at all.

Each is a checkpoint folder like any other (float32), with training_state/state.pt beside the weights. The position in
the data and every random number are functions of (seed, step), so that the step alone stands for them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from training.recipe import Recipe
from tuwen.checkpoint import read_checkpoint, write_checkpoint
from tuwen.errors import InvalidInput
from tuwen.files import replace_folder, sync
from tuwen.specs import ModelSpec

FORMAT = "tuwen-training-state-1"
_FOLDER, _PREFIX = "checkpoints", "step_"
_STATE = Path("training_state") / "state.pt"
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# What may differ between a run and its continuation: how it is computed, watched and kept.
_FREE_SECTIONS = {"engine", "valid", "run"}
_FREE_KEYS = {"data.num_workers", "data.prefetch_batches", "data.cache_decoded", "data.max_corrupt", "optim.chunk_size"}


@dataclass(frozen=True)
class State:
    """One moment of a run.

    Attributes:
        step: updates made.
        weights: of the model, float32, on the CPU.
        rest: optimizer, scaler, average and the like; tensors, numbers and strings only.
    """

    step: int
    weights: Mapping[str, Tensor]
    rest: Mapping[str, Any]


def save_state(out: Path, state: State, recipe: Recipe, spec: ModelSpec, model_card: str, keep_last: int) -> Path:
    """Write a state under a temporary name, rename it, and remove the oldest beyond `keep_last`; returns its folder."""
    target = out / _FOLDER / f"{_PREFIX}{state.step:08d}"
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / _STATE).parent.mkdir(parents=True)
    try:
        write_checkpoint(staging, spec, state.weights, model_card, torch.float32)
        about = {"format": FORMAT, "step": state.step, "recipe": recipe.model_dump_json()}
        torch.save({**about, "rest": dict(state.rest)}, staging / _STATE)
        sync(staging / _STATE)
        replace_folder(staging, target)
        sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in _states(out)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_state(out: Path) -> Path | None:
    """The folder to go on from; None where there is none."""
    states = _states(out)
    return states[-1] if states else None


def load_state(folder: Path, recipe: Recipe) -> State:
    """Read a state back.

    Raises:
        InvalidInput: it is not one, is damaged, or comes from a run whose recipe trains something else; the sentence
            names the first key that differs.
    """
    path = folder / _STATE
    if not path.is_file():
        raise InvalidInput(
            f"{folder}: no state of a run, {_STATE} is missing; they lie in {_FOLDER}/{_PREFIX}... of its folder"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"{path}: damaged or not a state of a run: {str(error).splitlines()[0]}") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise InvalidInput(f"{path}: expected the format {FORMAT!r}")
    if difference := _difference(json.loads(saved["recipe"]), json.loads(recipe.model_dump_json())):
        raise InvalidInput(
            f"{folder}: was trained with another recipe ({difference}); "
            "choose another run.out, or begin anew with --resume never"
        )
    weights, _, _ = read_checkpoint(folder)
    return State(saved["step"], weights, saved["rest"])


def remove_states(out: Path) -> None:
    """For a run that begins anew."""
    shutil.rmtree(out / _FOLDER, ignore_errors=True)


def _states(out: Path) -> list[Path]:
    """Oldest first. Unfinished ones have other names."""
    return sorted((out / _FOLDER).glob(f"{_PREFIX}*"))


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first key whose value changes what is trained; "" if none does."""
    for section in now:
        if section in _FREE_SECTIONS:
            continue
        for key, value in now[section].items():
            name, old = f"{section}.{key}", before.get(section, {}).get(key)
            if name not in _FREE_KEYS and old != value:
                return f"{name} was {old!r}, is {value!r}"
    old_seed, seed = before["run"]["seed"], now["run"]["seed"]
    return f"run.seed was {old_seed}, is {seed}" if old_seed != seed else ""


# --- what is sharded over processes, as a whole --------------------------------------------------------------


def whole_weights(module: nn.Module, is_sharded: bool, everywhere: bool = False) -> dict[str, Tensor]:
    """A module's state dict on the CPU; all processes call it, only the first gets the tensors of a sharded one.

    Args:
        everywhere: all get them, on their devices.
    """
    if is_sharded:
        options = StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
        found: dict[str, Any] = get_model_state_dict(module, options=options)
        return found
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def put_weights(module: nn.Module, weights: Mapping[str, Tensor], is_sharded: bool) -> None:
    """The reverse; every process has the whole."""
    if is_sharded:
        set_model_state_dict(module, dict(weights), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(weights)


def whole_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, is_sharded: bool) -> dict[str, Any]:
    """As `whole_weights`, of an optimizer of the module's parameters."""
    return dict(get_optimizer_state_dict(module, optimizer, options=_WHOLE)) if is_sharded else optimizer.state_dict()


def put_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], is_sharded: bool
) -> None:
    if is_sharded:
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(module, optimizer, dict(state), options=options)
    else:
        optimizer.load_state_dict(dict(state))
