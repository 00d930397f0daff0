"""Sets made of what the registries carry: scikit-learn's digits, and Emoji-CN by group."""

from __future__ import annotations

import io
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.class_folders import read_class_folders
from eval.engines import open_engine
from eval.prompts import find_task
from eval.sample_sets import GROUP_LABELS, write_digits, write_emoji_groups
from eval.zero_shot import build_classifier, evaluate_zero_shot
from tuwen.data.emoji_cn import GROUPS, read_groups
from tuwen.data.pairs import ImageRecord, TextRecord, open_pairs, write_images, write_texts
from tuwen.errors import InvalidInput

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "emoji_cn"


def some_emoji(folder: Path, wanted: dict[str, int]) -> Path:
    """An Emoji-CN folder of the first few pictures of some groups of the committed sample."""
    pairs = open_pairs(SAMPLE, "valid")
    groups = read_groups(SAMPLE, pairs.image_ids)
    chosen = [
        image_id
        for group, count in wanted.items()
        for image_id in islice((one for one, own in groups.items() if own == group), count)
    ]
    folder.mkdir()
    write_images(folder / "valid_imgs.tsv", (ImageRecord(one, pairs.image_bytes(one)) for one in chosen))
    write_texts(folder / "valid_texts.jsonl", [TextRecord(0, "表情", tuple(chosen))])
    (folder / "groups.tsv").write_bytes((SAMPLE / "groups.tsv").read_bytes())
    return folder


def test_the_digits_are_scikit_learns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    expected = datasets.load_digits()
    assert write_digits(tmp_path / "digits") == 1797
    data = read_class_folders(tmp_path / "digits")
    assert data.labels == tuple("零一二三四五六七八九")
    number = {Path(file).stem: int(label) for file, label in zip(data.files, data.truth, strict=True)}
    assert [number[f"{position:04}"] for position in range(1797)] == expected.target.tolist()
    picture = Image.open(data.root / data.files[0])
    assert (picture.size, picture.mode) == ((64, 64), "L")
    first = int(Path(data.files[0]).stem)
    # Shrunk again it is the digit.
    small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), np.float32) / 16
    assert np.corrcoef(small.ravel(), expected.images[first].ravel())[0, 1] > 0.97


def test_every_group_has_a_chinese_label() -> None:
    assert set(GROUP_LABELS) == set(GROUPS)
    assert len(set(GROUP_LABELS.values())) == len(GROUPS)


def test_emoji_lie_in_the_folder_of_their_group(tmp_path: Path) -> None:
    """A group without a picture is no label; a second run replaces the first."""
    source = some_emoji(tmp_path / "emoji", {"flags": 3, "food-drink": 2})
    (tmp_path / "out" / "test" / "7").mkdir(parents=True)
    assert write_emoji_groups(tmp_path / "out", source) == 5
    data = read_class_folders(tmp_path / "out")
    assert data.labels == ("食物与饮料", "旗帜")
    assert Counter(data.truth.tolist()) == {0: 2, 1: 3}
    assert sorted(path.name for path in (tmp_path / "out" / "test").iterdir()) == ["0", "1"]
    pairs = open_pairs(SAMPLE, "valid")
    for file in data.files:
        assert (data.root / file).read_bytes() == pairs.image_bytes(int(Path(file).stem))
    assert Image.open(io.BytesIO((data.root / data.files[0]).read_bytes())).format == "WEBP"


def test_a_set_without_groups_is_refused(tmp_path: Path) -> None:
    source = some_emoji(tmp_path / "emoji", {"flags": 1})
    (source / "groups.tsv").unlink()
    with pytest.raises(InvalidInput, match=r"groups\.tsv: expected lines"):
        write_emoji_groups(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("one_thread")
def test_the_sample_checkpoint_tells_flags_from_faces(tmp_path: Path) -> None:
    """Pictures of the held-out style; 旗帜 is a caption it was trained with, 笑脸与情感 is not. Chance is one half."""
    source = some_emoji(tmp_path / "emoji", {"smileys-emotion": 40, "flags": 40})
    write_emoji_groups(tmp_path / "emoji-groups", source)
    data, task = read_class_folders(tmp_path / "emoji-groups"), find_task("emoji-groups")
    assert task is not None
    with open_engine("torch", checkpoint=ROOT / "samples" / "emoji_tiny") as engine:
        classifier = build_classifier(engine, data.labels, task.templates)
        result, _ = evaluate_zero_shot(engine, data, task, classifier)
    assert result.num_images == 80
    assert result.score > 0.8
