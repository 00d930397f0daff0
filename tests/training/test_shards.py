"""Shards: written whole, indexed once, and read in an order of which any position is found at once."""

from __future__ import annotations

import base64
import logging
import os
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import training.shards
from tests.shapes import MemoryPairs, draw_shape, shape_pairs, write_pairs
from training.batch import Batch, Keys
from training.recipe import DataSection
from training.shards import SHARDS_TOGETHER, ShardBatches
from tuwen.data.lmdb import write_lmdb
from tuwen.data.pairs import TextRecord
from tuwen.data.shards import ensure_index, find_shards, index_path, read_index, write_shards
from tuwen.errors import InvalidInput
from tuwen.image_transform import decode_image, resize_image
from tuwen.tokenizer import default_tokenizer

ROOT = Path(__file__).parents[2]
RESOLUTION = 32
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    """The glob of 40 pairs in 6 shards: two groups, the second of them short."""
    write_pairs(tmp_path / "data", "train", shape_pairs())
    return f"{write_shards(tmp_path / 'data', 'train', tmp_path / 'shards', 6)}/*.tsv"


def batches_of(
    pattern: str, batch_size: int, seed: int = 0, rank: int = 0, num_processes: int = 1, **settings: object
) -> ShardBatches:
    data = DataSection.model_validate({"shards": pattern, "unit": "pair"} | settings)
    return ShardBatches(data, RESOLUTION, batch_size, seed, rank, num_processes)


def keys(batch: Batch) -> tuple[Tensor, Tensor]:
    assert isinstance(batch.positives, Keys)
    return batch.positives.images, batch.positives.texts


def shown(batch: Batch) -> list[tuple[int, str]]:
    """(image id, caption) of every row, told from its pixels and its input_ids."""
    pairs, tokenizer = shape_pairs(), default_tokenizer()
    picture_of = {
        resize_image(decode_image(encoded), RESOLUTION).tobytes(): image_id
        for image_id, encoded in pairs.images.items()
    }
    caption_of = {tuple(tokenizer.encode_ids(record.text)): record.text for record in pairs.texts}
    rows = batch.pixels.permute(0, 2, 3, 1).numpy()
    told = [picture_of[row.tobytes()] for row in rows]
    assert tuple(told) == batch.image_ids
    return [(image_id, caption_of[text]) for image_id, text in zip(told, batch.texts, strict=True)]


ALL_PAIRS = {(image_id, record.text) for record in shape_pairs().texts for image_id in record.image_ids}


# --- reading --------------------------------------------------------------------------------------------------------


def test_each_pair_comes_once_an_epoch_and_epochs_differ(pattern: str) -> None:
    batches = batches_of(pattern, 8)
    assert len(batches) == 5
    epochs = [[pair for number in range(5) for pair in shown(batches.batch(epoch, number))] for epoch in range(3)]
    assert all(len(order) == 40 and set(order) == ALL_PAIRS for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_pairs_that_belong_together_have_equal_keys(pattern: str) -> None:
    """By picture and by what the caption says."""
    (batch,) = [batches_of(pattern, 40).batch(0, 0)]
    images, texts = keys(batch)
    assert images.dtype == texts.dtype == torch.int64
    pairs = shown(batch)
    for one, (image_id, caption) in enumerate(pairs):
        for other, (other_id, other_caption) in enumerate(pairs):
            assert bool(images[one] == images[other]) == (image_id == other_id)
            assert bool(texts[one] == texts[other]) == (caption == other_caption)


def same(one: Batch, other: Batch) -> bool:
    tensors = zip(
        (one.pixels, one.is_readable, *keys(one)), (other.pixels, other.is_readable, *keys(other)), strict=True
    )
    return (one.image_ids, one.texts) == (other.image_ids, other.texts) and all(torch.equal(*pair) for pair in tensors)


def test_a_batch_depends_on_nothing_asked_for_before(pattern: str) -> None:
    """So that a run resumes anywhere."""
    forwards = batches_of(pattern, 7, seed=3, drop_tokens=0.5)
    places = [(epoch, number) for epoch in range(3) for number in range(len(forwards))]
    expected = {place: forwards.batch(*place) for place in places}
    backwards = batches_of(pattern, 7, seed=3, drop_tokens=0.5)
    assert all(same(backwards.batch(*place), expected[place]) for place in reversed(places))
    assert not same(batches_of(pattern, 7, seed=4).batch(0, 0), expected[0, 0])


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_the_batch_of_one(num_processes: int, tmp_path: Path) -> None:
    """Also what is dropped from captions, which is drawn."""
    for shard in range(3):
        lines = (line_of(number, text=f"一个很大的红色的圆{number}") for number in range(shard * 12, shard * 12 + 12))
        (tmp_path / f"{shard}.tsv").write_bytes(b"".join(lines))
    pattern = f"{tmp_path}/*.tsv"
    whole = batches_of(pattern, 12, drop_tokens=0.5)
    parts = [batches_of(pattern, 12, 0, rank, num_processes, drop_tokens=0.5) for rank in range(num_processes)]
    for number in range(len(whole)):
        expected, shares = whole.batch(1, number), [part.batch(1, number) for part in parts]
        joined = Batch(
            1,
            number,
            sum((share.image_ids for share in shares), ()),
            torch.cat([share.pixels for share in shares]),
            torch.cat([share.is_readable for share in shares]),
            sum((share.texts for share in shares), ()),
            Keys(*(torch.cat(part) for part in zip(*map(keys, shares), strict=True))),
        )
        assert same(joined, expected)
        assert len(set(map(len, expected.texts))) > 3  # so that something was dropped


def test_only_a_processs_own_lines_are_read(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read a line, of its own length; a position in the middle takes no more than one at the start."""
    sizes: list[int] = []
    pread = os.pread

    def counting(file: int, size: int, start: int) -> bytes:
        sizes.append(size)
        return pread(file, size, start)

    monkeypatch.setattr("os.pread", counting)
    loaded: list[Path] = []
    monkeypatch.setattr("training.shards.read_index", lambda shard: [loaded.append(shard), read_index(shard)][1])
    batches = batches_of(pattern, 8, rank=1, num_processes=2)
    batches.batch(5, 3)
    assert len(sizes) == 4
    assert sum(sizes) < sum(path.stat().st_size for path in find_shards(pattern)) / 5
    assert len(loaded) <= 2 * SHARDS_TOGETHER
    loaded.clear()
    for number in range(5):
        batches.batch(6, number)
    assert sorted(loaded) == find_shards(pattern)  # each index once an epoch


def test_memory_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    """32 MB of pictures and nothing of them stays; nor are the offsets of all shards ever in memory."""
    junk = base64.b64encode(bytes(3 * 2**20 // 4))
    for shard in range(8):
        lines = b"".join(b"%d\t%b\tx\n" % (shard * 4 + line, junk) for line in range(4))
        (tmp_path / f"{shard}.tsv").write_bytes(lines)
    batches = batches_of(f"{tmp_path}/*.tsv", 2)
    batches.batch(0, 0)
    tracemalloc.start()
    for number in range(1, 16):
        batches.batch(0, number)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 2**20  # a line, its picture in base64 and translated, and decoded


def test_few_files_are_open(tmp_path: Path) -> None:
    """A set may have thousands of shards; a process may have a thousand files."""
    for shard in range(20):
        (tmp_path / f"{shard}.tsv").write_bytes(line_of(shard))
    batches = batches_of(f"{tmp_path}/*.tsv", 2)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        batches.batch(0, number)
    assert len(os.listdir("/proc/self/fd")) - before <= SHARDS_TOGETHER


@pytest.mark.parametrize(
    ("key", "value"), [("join_captions", 0.5), ("distinct_captions", True), ("cache_decoded", True)]
)
def test_what_shards_cannot_do_is_refused(pattern: str, key: str, value: object) -> None:
    """Rather than ignored."""
    with pytest.raises(InvalidInput, match=rf"^data\.{key} is not for data\.shards"):
        batches_of(pattern, 4, **{key: value})


def test_no_shards_too_few_pairs_and_an_uneven_batch_are_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^data\.shards '.*/nowhere/\*': no file"):
        batches_of(f"{tmp_path}/nowhere/*", 4)
    with pytest.raises(InvalidInput, match=r"40 pairs, fewer than one batch of 41$"):
        batches_of(pattern, 41)
    with pytest.raises(InvalidInput, match=r"^optim\.batch_size 9 does not divide among 2 processes$"):
        batches_of(pattern, 9, num_processes=2)


# --- malformed ------------------------------------------------------------------------------------------------------


def line_of(image_id: int, encoded: bytes = draw_shape("红", "圆"), text: str = "红圆") -> bytes:
    return b"%d\t%b\t%b\n" % (image_id, base64.b64encode(encoded), text.encode())


MALFORMED = {
    "no tab": (b"7 AAAA x\n", "0 tabs, expected"),
    "one tab": (b"7\tAAAA\n", "1 tabs, expected"),
    "an odd id": (b"x\tAAAA\tx\n", "image id is 'x'"),
    "bad base64": (b"7\tAA*A\tx\n", "bad base64"),
    "no caption": (line_of(7, text=" "), "the caption is empty"),
    "no UTF-8": (line_of(7)[:-2] + b"\n", "the caption is not UTF-8"),
    "too long": (line_of(7, bytes(3000)), "the limit is 2000"),
    "no picture": (line_of(7, b"no picture"), "picture 7: image is not a readable"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_line_is_an_unreadable_picture(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One among whole ones, which are not disturbed; grey, nobody's positive, and logged once."""
    monkeypatch.setattr(training.shards, "MAX_LINE_BYTES", 2000)
    line, said = MALFORMED[kind]
    path = tmp_path / "x.tsv"
    path.write_bytes(line_of(1) + line + line_of(3))
    batches = batches_of(str(path), 3)
    for epoch in range(2):
        batch = batches.batch(epoch, 0)
        assert sorted(batch.is_readable.tolist()) == [False, True, True]
        row = batch.is_readable.tolist().index(False)
        assert (batch.pixels[row] == 128).all()
        assert batch.image_ids[row] == (7 if kind == "no picture" else -2)
        assert {1, 3} <= set(batch.image_ids)
        images, texts = keys(batch)
        assert len(set(images.tolist())) == 3
        assert len(set(texts.tolist())) == (1 if kind == "no picture" else 2)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"{path}: pair 2: ")
    assert said in warning


# --- the index ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 7, 2**20])
def test_lines_are_found_whatever_the_block(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank lines are none; the last needs no newline."""
    monkeypatch.setattr("tuwen.data.shards._BLOCK_BYTES", block)
    path = tmp_path / "x.tsv"
    for content, starts in (
        (b"one\ntwo\nthree\n", [0, 4, 8]),
        (b"one\ntwo\nthree", [0, 4, 8]),
        (b"\n\none\n\ntwo\n\n", [2, 7]),
        (b"", []),
    ):
        path.write_bytes(content)
        assert ensure_index(path) == len(starts)
        assert read_index(path).tolist() == [*starts, len(content)]
        assert np.fromfile(index_path(path), "<i8").tolist() == [*starts, len(content)]


def test_a_stale_index_is_made_anew(tmp_path: Path) -> None:
    """Of another size, older than its shard, or no index at all."""
    path = tmp_path / "x.tsv"
    path.write_bytes(line_of(1) + line_of(2))
    assert ensure_index(path) == 2
    made = index_path(path).stat().st_mtime_ns
    assert ensure_index(path) == 2
    assert index_path(path).stat().st_mtime_ns == made  # a fresh one is left alone
    path.write_bytes(line_of(1) * 3)
    os.utime(path, ns=(made, made))
    assert ensure_index(path) == 3
    swapped = line_of(1) + line_of(1)[:-1] + b" " * len(line_of(1)) + b"\n"  # as long as before
    assert len(swapped) == path.stat().st_size
    path.write_bytes(swapped)
    later = index_path(path).stat().st_mtime_ns + 1
    os.utime(path, ns=(later, later))
    assert ensure_index(path) == 2
    index_path(path).write_bytes(b"\0" * 11)
    assert ensure_index(path) == 2


def test_an_index_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(line_of(1))
    index_path(path).mkdir()
    with pytest.raises(InvalidInput, match=rf"^{path}: cannot be indexed in x\.tsv\.idx beside it: "):
        ensure_index(path)


def test_a_kill_while_indexing_leaves_no_index(tmp_path: Path) -> None:
    """At the last moment before it appears; the next one makes it."""
    path = tmp_path / "x.tsv"
    path.write_bytes(line_of(1) * 5)
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom tuwen.data.shards import ensure_index\n"
        f"os.replace = lambda *_: os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "ensure_index(Path(sys.argv[1]))"
    )
    result = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, check=False, timeout=120)
    assert result.returncode == -signal.SIGKILL
    assert not index_path(path).exists()
    assert find_shards(f"{tmp_path}/*") == [path]  # what the kill left is hidden
    assert ensure_index(path) == 5


# --- writing --------------------------------------------------------------------------------------------------------


def lines_in(folder: Path) -> Counter[tuple[int, bytes, str]]:
    found: Counter[tuple[int, bytes, str]] = Counter()
    for path in sorted(folder.glob("*.tsv")):
        for line in path.read_bytes().splitlines():
            image_id, encoded, text = line.split(b"\t")
            found[int(image_id), base64.b64decode(encoded), text.decode()] += 1
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_every_pair_is_written_once(packed: bool, tmp_path: Path) -> None:
    """From TSV or LMDB; shuffled; with an index each."""
    pairs = shape_pairs()
    write_pairs(tmp_path, "train", pairs)
    if packed:
        write_lmdb(tmp_path, "train")
    folder = write_shards(tmp_path, "train", tmp_path / "out", 3)
    assert folder == tmp_path / "out" / "train"
    assert lines_in(folder) == {(image_id, pairs.images[image_id], text): 1 for image_id, text in ALL_PAIRS}
    assert [ensure_index(path) for path in sorted(folder.glob("*.tsv"))] == [14, 13, 13]
    first = [line.split(b"\t")[0] for line in (folder / "00000.tsv").read_bytes().splitlines()]
    assert first != sorted(first)


def test_a_caption_stays_in_its_line(tmp_path: Path) -> None:
    """Tabs and newlines are spaces to the tokeniser too; a blank caption is no pair."""
    texts = [TextRecord(1, "红\t色\n的 圆", (1,)), TextRecord(2, " \n", (1,))]
    write_pairs(tmp_path, "train", MemoryPairs({1: b"picture"}, texts))
    folder = write_shards(tmp_path, "train", tmp_path / "out", 1)
    assert lines_in(folder) == {(1, b"picture", "红 色 的 圆"): 1}


def test_writing_again_replaces_all(tmp_path: Path) -> None:
    """Three shards in the place of six, and none of the six beside them."""
    write_pairs(tmp_path, "train", shape_pairs())
    write_shards(tmp_path, "train", tmp_path / "out", 6)
    told: list[tuple[int, int, str]] = []
    folder = write_shards(tmp_path, "train", tmp_path / "out", 3, lambda *news: told.append(news))
    assert sorted(path.name for path in folder.iterdir()) == [
        f"0000{shard}.tsv{suffix}" for shard in range(3) for suffix in ("", ".idx")
    ]
    assert told[-1] == (3, 3, "writing shards")
    with pytest.raises(InvalidInput, match="--shards 41: expected 1 to 40"):
        write_shards(tmp_path, "train", tmp_path / "out", 41)
    assert len(lines_in(folder)) == 40
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]
