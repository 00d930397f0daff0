"""Where a run's weights begin: a checkpoint, or each tower's own, or at random; and which of them stay as they are.

model = initial_model(recipe.model)
freeze(model, recipe.model)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from training.recipe import ModelSection
from tuwen.checkpoint import (
    StateDict,
    check_fit,
    interpolate_positions,
    load_checkpoint,
    read_official,
    read_safetensors,
)
from tuwen.errors import InvalidInput
from tuwen.model import ChineseCLIP

_POSITIONS = ("positional_embedding", "attnpool.positional_embedding")
# A BERT's heads and buffers, which the text tower has not: it is read off at [CLS] without a pooler.
_UNUSED_OF_BERT = re.compile(r"(pooler|cls)\.|.*position_ids$")
# LayerNorm's names in files that were converted from TensorFlow's.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def initial_model(section: ModelSection) -> ChineseCLIP:
    """The model a run starts from, fp32, on the CPU, in training mode; what no file gives is random (torch's seed).

    Raises:
        InvalidInput: a file cannot be read, or its weights do not fit; the sentence names file, keys and shapes.
    """
    if section.init_checkpoint:
        return load_checkpoint(section.init_checkpoint, section.spec).train()
    model = ChineseCLIP(section.spec)
    if section.init_vision:
        _load(model.visual, read_vision(section.init_vision), model, section.init_vision)
    if section.init_text:
        weights_path = _bert_file(section.init_text)
        _load(model.bert, read_bert(weights_path), model, weights_path)
    return model.train()


def read_vision(path: Path) -> StateDict:
    """The image tower's weights of a CLIP, OpenAI's or Chinese-CLIP's, without their `visual.` prefix.

    Args:
        path: a state dict as .pt or .safetensors: of the whole model, or of the tower alone.
    """
    return _below("visual.", _read(path))


def read_bert(path: Path) -> StateDict:
    """A BERT's weights under the text tower's names, without what it does not use.

    Args:
        path: a Hugging Face pytorch_model.bin or model.safetensors, of a BertModel or one with a head upon it.
    """
    renamed = {_without_old_names(key): value for key, value in _below("bert.", _read(path)).items()}
    return {key: value for key, value in renamed.items() if not _UNUSED_OF_BERT.match(key)}


def _read(path: Path) -> StateDict:
    if not path.is_file():
        raise InvalidInput(f"{path}: there is no such file of weights")
    state_dict = read_safetensors(path) if path.suffix == ".safetensors" else read_official(path)
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def _below(prefix: str, state_dict: Mapping[str, Tensor]) -> StateDict:
    """What lies under `prefix`, without it; all of it where nothing does."""
    below = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    return below or dict(state_dict)


def _without_old_names(key: str) -> str:
    for old, new in _OLD_NAMES.items():
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _bert_file(path: Path) -> Path:
    """The weights' file of a BERT, which may be named by its folder."""
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise InvalidInput(f"{path}: neither model.safetensors nor pytorch_model.bin is in this folder")


def _load(tower: nn.Module, given: StateDict, model: ChineseCLIP, source: Path) -> None:
    expected = tower.state_dict()
    for key in _POSITIONS:
        if key in given and key in expected:
            given[key] = interpolate_positions(given[key], expected[key].shape[0])
    which = "image" if tower is model.visual else "text"
    check_fit(expected, given, f"the {which} tower of {model.spec.name}", source)
    tower.load_state_dict(given)  # copies into fp32, whatever the file has


# --- freezing ---------------------------------------------------------------------------------------------------


def freeze(model: ChineseCLIP, section: ModelSection) -> None:
    """Take the towers that the recipe freezes out of training; logit_scale stays in it."""
    for module in _frozen_towers(model, section):
        module.requires_grad_(False)
    if section.freeze_text:
        model.text_projection.requires_grad_(False)


def keep_frozen_in_eval(model: ChineseCLIP, section: ModelSection) -> None:
    """Call it after every `model.train()`: a frozen tower drops nothing out, and its BatchNorm keeps its statistics."""
    for module in _frozen_towers(model, section):
        module.eval()


def _frozen_towers(model: ChineseCLIP, section: ModelSection) -> list[nn.Module]:
    frozen = ((model.visual, section.freeze_vision), (model.bert, section.freeze_text))
    return [tower for tower, is_frozen in frozen if is_frozen]
