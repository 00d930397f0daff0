"""CLIP_benchmark's Chinese sets in, its result out."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from eval.chinese_clip_files import TEXT_TO_IMAGE, Features, write_answers, write_features
from tests.shapes import draw_shape
from tuwen.cli import app
from tuwen.data.clip_benchmark import write_clip_benchmark_pairs
from tuwen.data.pairs import open_pairs
from tuwen.errors import InvalidInput

PICTURES = {
    "1000.jpg": draw_shape("红", "圆"),
    "a.b,c.jpg": draw_shape("蓝", "方块"),
    "7.jpg": draw_shape("绿", "三角"),
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in PICTURES.items():
        (folder / name).write_bytes(content)
    return folder


def texts_of(folder: Path) -> list[tuple[int, str, tuple[int, ...]]]:
    return [(one.text_id, one.text, one.image_ids) for one in open_pairs(folder, "test").texts]


def test_flickr_in_chinese(tmp_path: Path, images: Path) -> None:
    """Captions of a picture need not follow each other, and may hold commas; names too."""
    source = tmp_path / "flickr30k_test_zh.txt"
    source.write_text("image,caption\n1000.jpg,一个红圆\na.b,c.jpg,蓝色,方块\n1000.jpg,红色的圆\n\n7.jpg,见a.jpg,绿\n")
    assert write_clip_benchmark_pairs(source, images, tmp_path / "out", "test") == (3, 4)
    pairs = open_pairs(tmp_path / "out", "test")
    assert [pairs.image_bytes(one) for one in pairs.image_ids] == list(PICTURES.values())
    expected = [(0, "一个红圆", (0,)), (1, "红色的圆", (0,)), (2, "蓝色,方块", (1,)), (3, "见a.jpg,绿", (2,))]
    assert texts_of(tmp_path / "out") == expected


def test_the_multilingual_sets(tmp_path: Path, images: Path) -> None:
    """One caption a picture; paths as they were where the file was made, or in another folder now."""
    there = {
        "image_paths": [str(images / name) for name in PICTURES],
        "annotations": ["红", "蓝", "绿"],
        "indicies": [0],
    }
    elsewhere = there | {"image_paths": [f"root/xtd10/images/{name}" for name in PICTURES]}
    for name, content, folder in (
        ("xtd10-zh.json", there, None),
        ("crossmodal3600_captions-zh.json", elsewhere, images),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        out = tmp_path / f"from_{name}"
        assert write_clip_benchmark_pairs(tmp_path / name, folder, out, "test") == (3, 3)
        assert texts_of(out) == [(0, "红", (0,)), (1, "蓝", (1,)), (2, "绿", (2,))]
        pairs = open_pairs(out, "test")
        assert [pairs.image_bytes(one) for one in pairs.image_ids] == list(PICTURES.values())


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def webdataset(tmp_path: Path) -> Path:
    """Two shards; picture before and after its captions."""
    root = tmp_path / "wds"
    red, blue, green = PICTURES.values()
    write_shard(
        root / "test/0.tar", {"s0.jpg": red, "s0.txt": "红\n圆形".encode(), "s1.txt": "蓝".encode(), "s1.PNG": blue}
    )
    write_shard(root / "test/1.tar", {"s0.webp": green, "s0.txt": "绿\n".encode()})
    (root / "test/nshards.txt").write_text("2\n")
    (root / "dataset_type.txt").write_text("retrieval")
    return root


def test_a_webdataset(webdataset: Path, tmp_path: Path) -> None:
    app(
        ["eval", "clip-benchmark-pairs", "--source", str(webdataset), "--out", str(tmp_path / "out")],
        standalone_mode=False,
    )
    pairs = open_pairs(tmp_path / "out", "test")
    assert [pairs.image_bytes(one) for one in pairs.image_ids] == list(PICTURES.values())
    assert texts_of(tmp_path / "out") == [(0, "红", (0,)), (1, "圆形", (0,)), (2, "蓝", (1,)), (3, "绿", (2,))]


def test_what_is_wrong_with_a_webdataset_is_said(webdataset: Path, tmp_path: Path) -> None:
    def convert() -> None:
        write_clip_benchmark_pairs(webdataset, None, tmp_path / "out", "test")

    (webdataset / "dataset_type.txt").write_text("classification")
    with pytest.raises(InvalidInput, match=r"wds: dataset_type.txt does not say retrieval"):
        convert()
    (webdataset / "dataset_type.txt").write_text("retrieval")
    write_shard(webdataset / "test/1.tar", {"s0.txt": b"x"})
    with pytest.raises(InvalidInput, match=r"1.tar: sample s0 has no picture"):
        convert()
    write_shard(webdataset / "test/1.tar", {"s0.jpg": b"x"})
    with pytest.raises(InvalidInput, match=r"wds: picture s0 has no caption"):
        convert()
    (webdataset / "test/1.tar").write_bytes(b"no tar")
    with pytest.raises(InvalidInput, match=r"1.tar: cannot be read"):
        convert()
    (webdataset / "test/nshards.txt").write_text("two")
    with pytest.raises(InvalidInput, match=r"nshards.txt says 'two', expected a number"):
        convert()
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("some.txt", "image,caption\n1000.jpg，红\n", r"some.txt:2: expected `NAME.jpg,caption`"),
        ("some.txt", "image,caption\n", r"some.txt: empty, expected pictures with captions"),
        (
            "some.txt",
            "image,caption\nlost.jpg,红\n",
            r"some.txt: picture .*lost.jpg: No such file .*--images says where",
        ),
        ("some.json", "{", r"some.json: expected .*image_paths"),
        ("some.json", '{"image_paths": ["a.jpg"], "annotations": []}', r"some.json: expected .*image_paths"),
        ("some.json", '{"image_paths": ["a.jpg"], "annotations": [["红"]]}', r"some.json: expected .*image_paths"),
        ("some.csv", "a,b", r"some.csv: expected a .txt or .json annotation"),
    ],
)
def test_a_malformed_annotation_is_one_sentence(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=sentence):
        write_clip_benchmark_pairs(tmp_path / name, tmp_path, tmp_path / "out", "test")


def recalls_by_definition(scores: np.ndarray, relevant: np.ndarray, k: int) -> float:
    """A query is answered when one of its items is among the k of highest score."""
    best = np.argsort(-scores, axis=1)[:, :k]
    return float(np.take_along_axis(relevant, best, axis=1).any(axis=1).mean())


def test_the_result_is_as_clip_benchmark_writes_it(tmp_path: Path) -> None:
    """Several captions to a picture, files in other orders than the annotations, some that ask nothing."""
    random = np.random.default_rng(0)
    image_ids, text_ids = random.permutation(100)[:30], random.permutation(200)[:60]
    images, texts = (random.standard_normal((n, 8)).astype(np.float32) for n in (30, 60))
    owner = random.integers(0, 29, 59)  # the last picture and the last text have no pair
    texts[:59] += images[owner]
    paths = [tmp_path / name for name in ("texts.jsonl", "images_feat.jsonl", "texts_feat.jsonl", "result.json")]
    answers = [(int(text), [int(image_ids[one])]) for text, one in zip(text_ids, owner, strict=False)]
    write_answers(paths[0], TEXT_TO_IMAGE, [answers[i] for i in random.permutation(59)] + [(int(text_ids[59]), [])])
    write_features(paths[1], "image", [Features(image_ids, images)])
    write_features(paths[2], "text", [Features(text_ids, texts)])
    arguments = ["--annotations", "--image-features", "--text-features", "--out"]
    options = [str(word) for pair in zip(arguments, paths, strict=True) for word in pair]
    names = [
        "--dataset",
        "flickr30k",
        "--model",
        "ViT-B-16",
        "--pretrained",
        "ours",
        "--recall-k",
        "1",
        "--recall-k",
        "5",
    ]
    app(["eval", "clip-benchmark-result", *options, *names], standalone_mode=False)
    result = json.loads(paths[3].read_text())
    relevant = owner[:, None] == np.arange(30)[None]
    asking = np.unique(owner)
    expected = {}
    for k in (1, 5):
        expected[f"image_retrieval_recall@{k}"] = recalls_by_definition(texts[:59] @ images.T, relevant, k)
        expected[f"text_retrieval_recall@{k}"] = recalls_by_definition(
            images[asking] @ texts[:59].T, relevant.T[asking], k
        )
    assert result.pop("metrics") == expected
    said = {"dataset": "flickr30k", "model": "ViT-B-16", "pretrained": "ours"}
    assert result == said | {"task": "zeroshot_retrieval", "language": "zh"}
    assert 0 < expected["image_retrieval_recall@1"] < expected["image_retrieval_recall@5"] < 1
    with pytest.raises(InvalidInput, match=r"image retrieval: k is 31, expected 1..30"):
        app(["eval", "clip-benchmark-result", *options, *names, "--recall-k", "31"], standalone_mode=False)
    write_features(paths[2], "text", [Features(text_ids[1:], texts[1:])])
    with pytest.raises(InvalidInput, match=rf"texts_feat.jsonl: 1 annotated texts .* text_id {text_ids[0]}"):
        app(["eval", "clip-benchmark-result", *options, *names], standalone_mode=False)
