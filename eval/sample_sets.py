"""Small real sets for zero-shot classification, made of what package registries carry.

    python -m eval.sample_sets --out data/zero_shot

| set | what | source |
|---|---|---|
| digits | 1,797 handwritten digits, 8 x 8, as 64 x 64 | scikit-learn (UCI, CC-BY-4.0) |
| emoji-groups | the emoji of an Emoji-CN folder by Unicode's groups | samples/emoji_cn |

Each becomes a folder in Chinese-CLIP's layout: label_cn.txt, label.txt, test/0, test/1 ...
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from eval.class_folders import LABELS_NAME
from tuwen.data.emoji_cn import read_groups
from tuwen.data.pairs import open_pairs
from tuwen.errors import MissingDependency
from tuwen.files import replace_folder

_DIGIT_SIDE, _DIGIT_LEVELS = 64, 16
_DIGIT_LABELS = {"zero": "零", "one": "一", "two": "二", "three": "三", "four": "四", "five": "五",
                 "six": "六", "seven": "七", "eight": "八", "nine": "九"}  # fmt: skip
# emojibase's own Chinese names of the groups are machine-made (旗帜 is fine, 人的符号 is not): these are ours.
GROUP_LABELS = {
    "smileys-emotion": "笑脸与情感",
    "people-body": "人物与身体",
    "component": "部件",
    "animals-nature": "动物与自然",
    "food-drink": "食物与饮料",
    "travel-places": "旅行与地点",
    "activities": "活动与运动",
    "objects": "物品",
    "symbols": "符号",
    "flags": "旗帜",
}


@dataclass(frozen=True)
class LabelledPicture:
    """One picture file: the position of its label, its name with suffix, its bytes."""

    label: int
    name: str
    encoded: bytes


def write_class_folders(folder: Path, labels: Mapping[str, str], pictures: Iterable[LabelledPicture]) -> int:
    """Write a set, replacing what is there; returns the number of pictures.

    Args:
        labels: English -> Chinese, in the order of the positions.
    """
    # As Chinese-CLIP names them, so that their order by name is their order by number.
    width = 1 if len(labels) <= 10 else 3
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    count = 0
    try:
        for name, lines in (("label.txt", labels.keys()), (LABELS_NAME, labels.values())):
            (staging / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        for label in range(len(labels)):
            (staging / "test" / f"{label:0{width}}").mkdir(parents=True)
        for picture in pictures:
            (staging / "test" / f"{picture.label:0{width}}" / picture.name).write_bytes(picture.encoded)
            count += 1
        replace_folder(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return count


def write_digits(folder: Path) -> int:
    """scikit-learn's digits, white on black as MNIST's, enlarged eightfold.

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency("the digits are scikit-learn's: pip install scikit-learn") from error
    digits = load_digits()
    pictures = (
        LabelledPicture(int(label), f"{number:04}.png", _enlarged(values))
        for number, (values, label) in enumerate(zip(digits.images, digits.target, strict=True))
    )
    return write_class_folders(folder, _DIGIT_LABELS, pictures)


def _enlarged(values: np.ndarray) -> bytes:
    levels = np.clip(values * (256 / _DIGIT_LEVELS), 0, 255).astype(np.uint8)
    picture = Image.fromarray(levels).resize((_DIGIT_SIDE, _DIGIT_SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_emoji_groups(folder: Path, emoji_cn: Path, split: str = "valid") -> int:
    """An Emoji-CN folder's pictures by group; a group without a picture is no label.

    Raises:
        InvalidInput: it is no Emoji-CN folder, or has no groups.tsv.
    """
    pairs = open_pairs(emoji_cn, split)
    groups = read_groups(emoji_cn, pairs.image_ids)
    present = [key for key in GROUP_LABELS if key in groups.values()]
    pictures = (
        LabelledPicture(present.index(group), f"{image_id}.webp", pairs.image_bytes(image_id))
        for image_id, group in groups.items()
    )
    return write_class_folders(folder, {key: GROUP_LABELS[key] for key in present}, pictures)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write small real sets for tuwen eval zero-shot.")
    parser.add_argument("--out", type=Path, default=Path("data/zero_shot"), help="folder of the sets")
    parser.add_argument("--emoji", type=Path, default=Path("samples/emoji_cn"), help="an Emoji-CN folder")
    parser.add_argument("--split", default="valid", help="which split of it")
    chosen = parser.parse_args(arguments)
    print(f"{chosen.out / 'digits'}: {write_digits(chosen.out / 'digits')} pictures")
    count = write_emoji_groups(chosen.out / "emoji-groups", chosen.emoji, chosen.split)
    print(f"{chosen.out / 'emoji-groups'}: {count} pictures")


if __name__ == "__main__":
    main()
