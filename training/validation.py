"""How good a model is while it trains: recall over the whole validation set, and zero-shot accuracy on pictures.

    pairs = open_pairs(recipe.valid_path, recipe.valid.split)
    classes = open_zero_shot(recipe.valid.zero_shot)
    record = validate(model, recipe, pairs, classes, step, epoch)

All processes of a run call it together; each embeds its share, and all get the same record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from training.metrics import ValidationRecord
from training.recipe import Recipe
from tuwen.data.pairs import PairSet
from tuwen.embed import Embeddings, RetrievalSet, embed_pictures, embed_pixels, embed_texts
from tuwen.errors import InvalidInput
from tuwen.image_transform import preprocess_image
from tuwen.model import ChineseCLIP
from tuwen.scoring import DEFAULT_TEMPLATES, average_prompts, fill_templates

LABELS_FILE = "label_cn.txt"


@dataclass(frozen=True)
class ZeroShotSet:
    """Pictures of classes: `targets` are indices into `labels`, one for each of `files`.

    Folders whose classes have the same Chinese label are one class: by its text nobody could tell them apart.
    """

    labels: tuple[str, ...]
    files: tuple[Path, ...]
    targets: tuple[int, ...]


def open_zero_shot(folder: Path) -> ZeroShotSet:
    """An ImageNet-style folder: a sub-folder a class, and label_cn.txt, a line a class in the order of their names.

    Raises:
        InvalidInput: there is no such folder, no label file, another number of lines than of folders, an empty
            line, or a class without a file.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: there is no such folder of classes")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    lines = _label_lines(folder / LABELS_FILE)
    if len(lines) != len(classes):
        raise InvalidInput(f"{folder}: {len(classes)} folders, but {LABELS_FILE} has {len(lines)} lines")
    labels = tuple(dict.fromkeys(lines))
    files: list[Path] = []
    targets: list[int] = []
    for line, entry in zip(lines, classes, strict=True):
        found = sorted(file for file in entry.iterdir() if file.is_file() and not file.name.startswith("."))
        if not found:
            raise InvalidInput(f"{entry}: no picture is in this class ({line})")
        files += found
        targets += [labels.index(line)] * len(found)
    return ZeroShotSet(labels, tuple(files), tuple(targets))


def _label_lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise InvalidInput(f"{path}: missing, expected a Chinese label a line, in the order of the folders") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read as UTF-8: {error}") from None
    if not lines:
        raise InvalidInput(f"{path}: empty, expected a label a line")
    if "" in lines:
        raise InvalidInput(f"{path}:{lines.index('') + 1}: an empty line, expected a label")
    return lines


def validate(
    model: ChineseCLIP,
    recipe: Recipe,
    pairs: PairSet,
    classes: ZeroShotSet | None,
    step: int,
    epoch: int,
    on_progress: Callable[[str], None] = lambda what: None,
) -> ValidationRecord:
    """Measure the model as it is; its modules' modes are afterwards what they were.

    Args:
        model: without DDP's wrapper. Under FSDP too, every process makes the same number of calls.
        on_progress: hears what is going on, as Watcher.on_activity.
    Raises:
        InvalidInput: a validation picture is unreadable, or more than data.max_corrupt of a process's zero-shot
            pictures are; the sentence names it.
    """
    started = time.monotonic()
    chosen = RetrievalSet.of(pairs)
    with _in_eval(model):
        mine = _share(len(chosen.image_ids))
        image_embeds = embed_pictures(
            model,
            pairs,
            [chosen.image_ids[index] for index in mine],
            recipe.valid.batch_size,
            lambda done: on_progress(f"validating, {done} of {len(mine)} pictures"),
        )
        text_embeds = embed_texts(model, [chosen.texts[index] for index in _share(len(chosen.texts))])
        scores = chosen.score(
            _gather(image_embeds, len(chosen.image_ids), model), _gather(text_embeds, len(chosen.texts), model)
        )
        accuracy = None if classes is None else _zero_shot_accuracy(model, recipe, classes, on_progress)
    on_progress("")
    return ValidationRecord(
        step=step, epoch=epoch, **scores, elapsed_s=round(time.monotonic() - started, 3), zero_shot_accuracy=accuracy
    )


@contextmanager
def _in_eval(model: ChineseCLIP) -> Iterator[None]:
    """Eval mode for a while; a frozen tower was in it before, and stays in it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# --- zero-shot --------------------------------------------------------------------------------------------------


def _zero_shot_accuracy(
    model: ChineseCLIP, recipe: Recipe, classes: ZeroShotSet, on_progress: Callable[[str], None]
) -> float:
    """Top-1 over all readable pictures."""
    prompts = fill_templates(classes.labels, DEFAULT_TEMPLATES)
    label_embeds = average_prompts(embed_texts(model, prompts), len(classes.labels))
    mine = _share(len(classes.files))
    reader = _PictureReader([classes.files[index] for index in mine], model.spec.vision.resolution, recipe)
    image_embeds = embed_pixels(
        model,
        reader.pixels(),
        recipe.valid.batch_size,
        lambda done: on_progress(f"classifying, {done} of {len(mine)} pictures"),
    )
    targets = np.array([classes.targets[index] for index in mine])
    # Of the last rows some only fill the share up, see `_share`.
    counts = np.array(reader.is_readable) & (_rank() + np.arange(len(mine)) * _num_processes() < len(classes.files))
    is_right = ((image_embeds @ label_embeds.T).argmax(axis=1) == targets) & counts
    num_right, num_counted = _sum([int(is_right.sum()), int(counts.sum())], model)
    if not num_counted:
        raise InvalidInput(f"{recipe.valid.zero_shot}: none of its pictures can be read")
    return num_right / num_counted


class _PictureReader:
    """Pixels of picture files; an unreadable one is black and marked, up to the recipe's limit."""

    def __init__(self, files: list[Path], resolution: int, recipe: Recipe) -> None:
        self.files, self.resolution, self.limit = files, resolution, recipe.data.max_corrupt
        self.is_readable: list[bool] = []

    def pixels(self) -> Iterator[Embeddings]:
        """pixel_values (3, R, R) of each.

        Raises:
            InvalidInput: one more than data.max_corrupt is unreadable; the sentence names it.
        """
        for file in self.files:
            try:
                pixel_values = preprocess_image(file.read_bytes(), self.resolution)
                self.is_readable.append(True)
            except (InvalidInput, OSError) as error:
                self.is_readable.append(False)
                if self.is_readable.count(False) > self.limit:
                    raise InvalidInput(f"{file}: {error}; data.max_corrupt allows {self.limit}") from error
                pixel_values = np.zeros((3, self.resolution, self.resolution), np.float32)
            yield pixel_values


# --- several processes --------------------------------------------------------------------------------------------


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _share(count: int) -> list[int]:
    """This process's of `count` items: rank, rank + W, ...; as many in each, so the last may be there again."""
    rank, num_processes = _rank(), _num_processes()
    return [min(rank + start, count - 1) for start in range(0, count, num_processes)]


def _gather(rows: Embeddings, count: int, model: ChineseCLIP) -> Embeddings:
    """The rows (count, D) of all processes' shares, in the items' order."""
    if not dist.is_initialized():
        return rows
    mine = torch.from_numpy(rows).to(model.logit_scale.device)
    parts = [torch.empty_like(mine) for _ in range(_num_processes())]
    dist.all_gather(parts, mine)
    gathered: Embeddings = torch.stack(parts, dim=1).flatten(0, 1)[:count].cpu().numpy()
    return gathered


def _sum(values: list[int], model: ChineseCLIP) -> list[int]:
    """Of all processes."""
    total = torch.tensor(values, device=model.logit_scale.device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return [int(value) for value in total.tolist()]
