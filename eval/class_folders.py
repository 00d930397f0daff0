"""Pictures sorted into a folder per class, with a file of Chinese labels: the layout of Chinese-CLIP's ELEVATER sets.

    DIR/label_cn.txt    one label a line; line 0 belongs to folder 0 or 000
    DIR/test/000/...    pictures, also in folders below
    DIR/index.json      optional: the order in which a submission lists the pictures

An ImageNet-style folder is read too: class folders of any name and a label file in their sorted order, or with lines
of `folder, tab, label`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tuwen.errors import InvalidInput

LABELS_NAME, INDEX_NAME = "label_cn.txt", "index.json"
# What torchvision's ImageFolder takes for a picture: index.json counts these, in that order.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Pictures:
    """What is classified.

    Attributes:
        files: below the root.
        labels_of: for each file its label, or its labels, as positions in the label file.
        picture_of_file: int64, for each file of the folders the position of its picture here.
    """

    files: Sequence[str]
    labels_of: Sequence[tuple[int, ...]]
    picture_of_file: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassFolders:
    """The files of all classes, in the order of torchvision's ImageFolder.

    Attributes:
        root: the folder of the class folders.
        labels: one may be there twice, as 太阳镜 is in ImageNet's.
        truth: int64 (F,), the label of each file's folder.
        index: int64, the submission's order as positions in `files`; None where there is no index.json.
    """

    root: Path
    labels: tuple[str, ...]
    files: tuple[str, ...]
    truth: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64] | None = None

    def pictures(self, is_multi_label: bool) -> Pictures:
        """Each file is one; in a set of several labels, a name in several class folders is one with all of them."""
        if not is_multi_label:
            truths = [(int(label),) for label in self.truth]
            return Pictures(self.files, truths, np.arange(len(self.files), dtype=np.int64))
        of_name: dict[str, list[int]] = {}
        for position, file in enumerate(self.files):
            of_name.setdefault(os.path.basename(file), []).append(position)
        picture_of_file = np.empty(len(self.files), np.int64)
        for picture, positions in enumerate(of_name.values()):
            picture_of_file[positions] = picture
        labels_of = [tuple(sorted({int(self.truth[one]) for one in positions})) for positions in of_name.values()]
        return Pictures([self.files[positions[0]] for positions in of_name.values()], labels_of, picture_of_file)


def read_class_folders(data: Path, split: str = "test", labels_path: Path | None = None) -> ClassFolders:
    """List the pictures of `data/split`, or of `data` itself where there is no such folder.

    Raises:
        InvalidInput: no labels, no pictures, a folder without a label, or an index.json that does not fit.
    """
    root = data / split if (data / split).is_dir() else data
    if not root.is_dir():
        raise InvalidInput(f"{data}: there is no such folder")
    lines = _read_labels(labels_path or _find_labels(data, root))
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not folders:
        raise InvalidInput(f"{root}: holds no class folders; expected {root}/000, {root}/001, ...")
    labels, label_of = _assign(lines, folders, root)
    files: list[str] = []
    truth: list[int] = []
    for folder in folders:
        found = list(_pictures_below(root, folder))
        files += found
        truth += [label_of[folder]] * len(found)
    if not files:
        raise InvalidInput(f"{root}: no pictures in its {len(folders)} class folders ({', '.join(IMAGE_SUFFIXES)})")
    index = _read_index(data / INDEX_NAME, len(files)) if (data / INDEX_NAME).is_file() else None
    return ClassFolders(root, labels, tuple(files), np.array(truth, np.int64), index)


def _find_labels(data: Path, root: Path) -> Path:
    for path in (data / LABELS_NAME, root / LABELS_NAME, root.parent / LABELS_NAME):
        if path.is_file():
            return path
    raise InvalidInput(f"{data}: no {LABELS_NAME} in it; name a file of one label a line with --labels")


def _read_labels(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InvalidInput(f"{path}: line {number} is empty; every line is the label of a class")
    if not lines:
        raise InvalidInput(f"{path}: holds no labels")
    return lines


def _assign(lines: list[str], folders: list[str], root: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """The labels, and for each folder the position of its own."""
    if all("\t" in line for line in lines):
        pairs = [line.split("\t", 1) for line in lines]
        position = {folder.strip(): number for number, (folder, _) in enumerate(pairs)}
        lines = [label for _, label in pairs]
    elif all(folder.isascii() and folder.isdigit() for folder in folders):
        # By number and not by order: a class without a test picture has no folder, and must not shift the others.
        position = {folder: int(folder) for folder in folders if int(folder) < len(lines)}
    elif len(folders) == len(lines):
        position = {folder: number for number, folder in enumerate(folders)}
    else:
        raise InvalidInput(
            f"{root}: {len(folders)} class folders, {len(lines)} labels; expected as many, folders named by line "
            "(000, 001, ...), or lines of `folder, tab, label`"
        )
    for folder in folders:
        if folder not in position:
            raise InvalidInput(f"{root / folder}: no label for this folder among {len(lines)} lines")
    return tuple(line.strip() for line in lines), position


def _pictures_below(root: Path, folder: str) -> Iterator[str]:
    """In ImageFolder's order: folders by name, then files by name."""
    for parent, _, names in sorted(os.walk(root / folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield os.path.relpath(os.path.join(parent, name), root)


def _read_index(path: Path, num_files: int) -> npt.NDArray[np.int64]:
    try:
        index = np.array(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: expected a JSON list of integers: {type(error).__name__}") from error
    if index.ndim != 1 or index.dtype.kind != "i" or not len(index):
        raise InvalidInput(f"{path}: expected a JSON list of integers")
    if index.min() < 0 or index.max() >= num_files:
        wrong = index[(index < 0) | (index >= num_files)][0]
        raise InvalidInput(f"{path}: names picture {wrong}, but there are {num_files}, counted from 0")
    return index.astype(np.int64)
