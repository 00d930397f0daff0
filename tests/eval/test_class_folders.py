"""Folders of classes: the layout Chinese-CLIP documents, torchvision's order, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from eval.class_folders import read_class_folders
from tuwen.errors import InvalidInput


def write(folder: Path, files: Iterable[str], labels: str = "甲\n乙\n丙\n") -> Path:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (folder / "label_cn.txt").write_text(labels, encoding="utf-8")
    return folder


def test_the_order_is_that_of_image_folder(tmp_path: Path) -> None:
    """Folders, then files by name, in folders below too: index.json counts in this order, and only pictures."""
    names = ["test/001/b.png", "test/000/z.JPG", "test/000/10.jpeg", "test/000/9.webp", "test/000/notes.txt",
             "test/002/sub/a.bmp", "test/002/x.tif", "test/readme.txt"]  # fmt: skip
    (write(tmp_path, names) / "index.json").write_text("[4, 0, 1]")
    data = read_class_folders(tmp_path)
    expected = ["000/10.jpeg", "000/9.webp", "000/z.JPG", "001/b.png", "002/x.tif", os.path.join("002", "sub", "a.bmp")]
    assert list(data.files) == expected
    assert data.truth.tolist() == [0, 0, 0, 1, 2, 2]
    assert data.labels == ("甲", "乙", "丙")
    assert data.index is not None
    assert data.index.tolist() == [4, 0, 1]
    pictures = data.pictures(is_multi_label=False)
    assert (list(pictures.files), pictures.picture_of_file.tolist()) == (expected, [0, 1, 2, 3, 4, 5])


def test_a_class_without_a_folder_shifts_none(tmp_path: Path) -> None:
    """By number, though 10 sorts before 2."""
    labels = "".join(f"标签{number}\n" for number in range(12))
    data = read_class_folders(write(tmp_path, ["test/10/a.png", "test/2/a.png"], labels))
    assert list(zip(data.files, data.truth.tolist(), strict=True)) == [("10/a.png", 10), ("2/a.png", 2)]


def test_an_imagenet_style_folder_with_its_labels_elsewhere(tmp_path: Path) -> None:
    """No test/ folder and names of synsets: labels in their order, or named one by one."""
    write(tmp_path / "val", ["n02/a.png", "n01/a.png"])
    (tmp_path / "val" / "label_cn.txt").unlink()
    (tmp_path / "labels.txt").write_text("\ufeff丁鲷\n金鱼\n\n", encoding="utf-8")
    data = read_class_folders(tmp_path / "val", labels_path=tmp_path / "labels.txt")
    assert (data.labels, list(data.files), data.truth.tolist()) == (
        ("丁鲷", "金鱼"),
        ["n01/a.png", "n02/a.png"],
        [0, 1],
    )
    (tmp_path / "labels.txt").write_text("n02\t金鱼\nn03\t大白鲨\nn01\t丁鲷\n", encoding="utf-8")
    named = read_class_folders(tmp_path / "val", labels_path=tmp_path / "labels.txt")
    assert (named.labels, named.truth.tolist()) == (("金鱼", "大白鲨", "丁鲷"), [2, 0])
    assert read_class_folders(tmp_path, "val", tmp_path / "labels.txt").root == tmp_path / "val"


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        (["test/3/a.png"], "甲\n乙\n丙\n", r"test/3: no label for this folder among 3 lines"),
        (["test/cat/a.png"], "甲\n乙\n丙\n", r"1 class folders, 3 labels"),
        (["test/cat/a.png"], "dog\t狗\n", r"test/cat: no label for this folder"),
        (["test/0/a.txt"], "甲\n", r"no pictures in its 1 class folders"),
        (["test/a.png"], "甲\n", r"holds no class folders"),
        (["test/0/a.png"], "甲\n\n乙\n", r"line 2 is empty"),
        (["test/0/a.png"], "\n", r"holds no labels"),
    ],
)
def test_what_cannot_be_right_is_said(tmp_path: Path, files: list[str], labels: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_class_folders(write(tmp_path, files, labels))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nowhere: there is no such folder"):
        read_class_folders(tmp_path / "nowhere")
    write(tmp_path, ["test/0/a.png"])
    with pytest.raises(InvalidInput, match=r"none\.txt: cannot be read: No such file"):
        read_class_folders(tmp_path, labels_path=tmp_path / "none.txt")
    (tmp_path / "label_cn.txt").unlink()
    with pytest.raises(InvalidInput, match=r"no label_cn\.txt in it; name a file"):
        read_class_folders(tmp_path)
    (tmp_path / "label_cn.txt").write_bytes("甲".encode("gb18030"))
    with pytest.raises(InvalidInput, match="not UTF-8"):
        read_class_folders(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[0, 1.5]", "[]", "[[0]]", "[0", '["0"]', "[true]"])
def test_an_index_is_a_list_of_integers(tmp_path: Path, content: str) -> None:
    (write(tmp_path, ["test/0/a.png", "test/0/b.png"]) / "index.json").write_text(content)
    with pytest.raises(InvalidInput, match=r"index\.json: expected a JSON list of integers"):
        read_class_folders(tmp_path)


@pytest.mark.parametrize("position", [-1, 2])
def test_an_index_outside_the_pictures_is_refused(tmp_path: Path, position: int) -> None:
    (write(tmp_path, ["test/0/a.png", "test/0/b.png"]) / "index.json").write_text(json.dumps([0, position]))
    with pytest.raises(InvalidInput, match=rf"names picture {position}, but there are 2"):
        read_class_folders(tmp_path)
