"""The LMDB: read by cn_clip and reading its own, safe from pickles and kills, usable from workers."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import lmdb
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import tuwen.data.lmdb as ours
from tuwen.data.lmdb import LmdbPairs, Pair, write_lmdb
from tuwen.data.pairs import ImageRecord, TextRecord, jsonl_path, open_pairs, tsv_path, write_images, write_texts
from tuwen.errors import InvalidInput

ROOT = Path(__file__).parents[2]


def picture(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


IMAGES = [ImageRecord(image_id, picture(image_id)) for image_id in (30, 4, 200)]
TEXTS = [TextRecord(8, "红色的龙", (30, 200)), TextRecord(2, "“猫”", (4,))]
PAIRS = [Pair(30, 8, "红色的龙"), Pair(200, 8, "红色的龙"), Pair(4, 2, "“猫”")]


def write_split(folder: Path, images: Iterable[ImageRecord] = IMAGES, texts: Iterable[TextRecord] = TEXTS) -> Path:
    write_images(tsv_path(folder, "train"), images)
    write_texts(jsonl_path(folder, "train"), texts)
    return folder


@pytest.fixture
def split_dir(tmp_path: Path) -> Path:
    return write_lmdb(write_split(tmp_path), "train")


def put(path: Path, key: bytes, value: bytes) -> None:
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        transaction.put(key, value)


def expect_all(pairs: LmdbPairs) -> None:
    assert (pairs.num_pairs, pairs.num_images) == (3, 3)
    assert list(pairs.pairs()) == PAIRS
    assert pairs.image_ids == [4, 30, 200]
    assert pairs.texts == TEXTS
    assert {image.image_id: pairs.image_bytes(image.image_id) for image in IMAGES} == {
        image.image_id: image.encoded for image in IMAGES
    }


def test_what_is_packed_is_read(split_dir: Path) -> None:
    expect_all(LmdbPairs(split_dir))


# --- cn_clip ------------------------------------------------------------------------------------------------


def test_cn_clips_dataset_reads_ours(split_dir: Path, cn_clip: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("Compose", "Resize", "ToTensor", "Normalize", "InterpolationMode", "create_transform")
    stub = ModuleType("stub")
    stub.__dict__.update(dict.fromkeys(names, lambda *args, **kwargs: None), BICUBIC=3)
    stub.InterpolationMode = stub  # type: ignore[attr-defined]
    for name in ("torchvision", "torchvision.transforms", "timm", "timm.data"):
        monkeypatch.setitem(sys.modules, name, stub)
    data = pytest.importorskip("cn_clip.training.data")
    dataset = data.LMDBDataset(str(split_dir), split="train")
    dataset.transform = lambda image: image.getpixel((0, 0))[0]
    assert (dataset.number_samples, dataset.number_images) == (3, 3)
    expected = cn_clip.tokenize([text.replace("“", '"').replace("”", '"') for _, _, text in PAIRS], context_length=64)
    for index, pair in enumerate(PAIRS):
        red, ids, _ = dataset[index]
        assert red == pair.image_id
        assert ids.tolist() == expected[index].tolist()


def test_cn_clips_lmdb_is_read_unchanged(tmp_path: Path) -> None:
    pytest.importorskip("cn_clip", reason="pip install --no-deps cn-clip==1.6.0 six")
    write_split(tmp_path)
    command = [
        sys.executable,
        "-m",
        "cn_clip.preprocess.build_lmdb_dataset",
        "--data_dir",
        tmp_path,
        "--splits",
        "train",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    expect_all(LmdbPairs(tmp_path / "lmdb" / "train"))


def test_every_key_and_value_is_cn_clips(tmp_path: Path) -> None:
    pytest.importorskip("cn_clip", reason="pip install --no-deps cn-clip==1.6.0 six")
    write_split(tmp_path)
    command = [
        sys.executable,
        "-m",
        "cn_clip.preprocess.build_lmdb_dataset",
        "--data_dir",
        tmp_path,
        "--splits",
        "train",
    ]
    subprocess.run([*command, "--lmdb_dir", tmp_path / "theirs"], check=True, capture_output=True, timeout=120)
    write_lmdb(tmp_path, "train", tmp_path / "ours")
    for name in ("pairs", "imgs"):
        contents = []
        for folder in ("theirs", "ours"):
            with lmdb.open(str(tmp_path / folder / "train" / name), readonly=True, lock=False) as environment:
                contents.append(dict(environment.begin().cursor().iternext()))
        assert contents[0] == contents[1]


# --- pickles ------------------------------------------------------------------------------------------------


class RunsACommand:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("hidden", [False, True])
def test_a_pickle_that_runs_a_command_is_refused(split_dir: Path, tmp_path: Path, protocol: int, hidden: bool) -> None:
    marker = tmp_path / "owned"
    payload = RunsACommand(marker)
    value = pickle.dumps((4, 2, payload) if hidden else payload, protocol)
    put(split_dir / "pairs", b"1", value)
    pairs = LmdbPairs(split_dir)
    with pytest.raises(InvalidInput, match=rf"{split_dir}/pairs: key 1: .*refused: names (posix|nt)\.system"):
        pairs.pair(1)
    with pytest.raises(InvalidInput, match="key 1"):
        _ = pairs.texts
    assert not marker.exists()
    pickle.loads(value)  # noqa: S301
    assert marker.exists(), "the payload is harmless, so this test proves nothing"


@pytest.mark.parametrize(
    "value", [(1, 2), (1, 2, 3), (1.5, 2, "x"), (True, 2, "x"), ("x", 2, "x"), {1: 1, 2: 2, "x": "x"}, None, "abc"]
)
def test_a_value_that_is_no_pair_is_refused(split_dir: Path, value: object) -> None:
    put(split_dir / "pairs", b"0", pickle.dumps(value))
    with pytest.raises(InvalidInput, match=r"pairs: key 0: not a plain"):
        LmdbPairs(split_dir).pair(0)


def test_decimal_strings_are_ids(split_dir: Path) -> None:
    put(split_dir / "pairs", b"0", pickle.dumps(["30", "8", "x"]))
    assert LmdbPairs(split_dir).pair(0) == (30, 8, "x")


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value", "read", "said"),
    [
        ("pairs", b"num_samples", b"three", "num_pairs", "num_samples is missing or no number"),
        ("pairs", b"num_samples", b"4", "texts", "key 3 is missing of 4"),
        ("imgs", b"num_images", b"9", "image_ids", "3 pictures, num_images says 9"),
        ("imgs", b"4x", b"AAAA", "image_ids", "4 pictures, num_images says 3"),
        ("pairs", b"0", b"\x80\x04", "texts", "key 0: not a plain"),
    ],
)
def test_damage_is_named(split_dir: Path, name: str, key: bytes, value: bytes, read: str, said: str) -> None:
    put(split_dir / name, key, value)
    with pytest.raises(InvalidInput, match=rf"{split_dir}/{name}: {said}"):
        getattr(LmdbPairs(split_dir), read)


def test_a_picture_key_that_is_no_number_is_named(split_dir: Path) -> None:
    put(split_dir / "imgs", b"4x", b"AAAA")
    put(split_dir / "imgs", b"num_images", b"4")
    with pytest.raises(InvalidInput, match=r"imgs: key b'4x': image id is '4x'"):
        _ = LmdbPairs(split_dir).image_ids


def test_missing_and_broken_pictures_are_named(split_dir: Path) -> None:
    put(split_dir / "imgs", b"4", b"AA*A")
    pairs = LmdbPairs(split_dir)
    with pytest.raises(InvalidInput, match=r"imgs: picture 4: bad base64"):
        pairs.image_bytes(4)
    with pytest.raises(InvalidInput, match=r"imgs: picture 5 is missing"):
        pairs.image_bytes(5)


def test_a_copy_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    """Reading past the end of a mapped file is SIGBUS, which no except catches."""
    images = [ImageRecord(number, os.urandom(20_000)) for number in range(20)]
    split_dir = write_lmdb(write_split(tmp_path, images, [TextRecord(0, "x", (0,))]), "train")
    os.truncate(split_dir / "imgs" / "data.mdb", 100_000)
    with pytest.raises(InvalidInput, match=r"imgs: data\.mdb is cut off, 100000 of "):
        LmdbPairs(split_dir)


def test_a_folder_that_is_no_lmdb_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    with pytest.raises(InvalidInput, match="pairs: cannot be opened as an LMDB"):
        LmdbPairs(tmp_path)
    (tmp_path / "pairs" / "data.mdb").write_bytes(b"x" * 10_000)
    with pytest.raises(InvalidInput, match="pairs: cannot be opened as an LMDB"):
        LmdbPairs(tmp_path)


# --- writing ------------------------------------------------------------------------------------------------


def test_the_map_grows_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_INITIAL_MAP_BYTES", 64 * 1024)
    images = [ImageRecord(number, os.urandom(50_000)) for number in range(20)]
    split_dir = write_lmdb(write_split(tmp_path, images, [TextRecord(0, "x", tuple(range(20)))]), "train")
    assert (split_dir / "imgs" / "data.mdb").stat().st_size > 1_000_000
    pairs = LmdbPairs(split_dir)
    assert [pairs.image_bytes(number) for number in range(20)] == [image.encoded for image in images]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    write_lmdb(write_split(tmp_path), "train", on_progress=lambda *news: told.append(news))
    assert {what for _, _, what in told} == {"packing pictures", "packing pairs"}
    assert told[-1][0] == 3


def new_data(folder: Path) -> Path:
    return write_split(folder, [ImageRecord(1, b"new")], [TextRecord(1, "新", (1,))])


@pytest.mark.parametrize("bad_line", [b"{\n", b'{"text_id": 9, "text": "x", "image_ids": [99]}\n'])
def test_a_malformed_split_leaves_the_old_lmdb(split_dir: Path, tmp_path: Path, bad_line: bytes) -> None:
    with open(jsonl_path(new_data(tmp_path), "train"), "ab") as file:
        file.write(bad_line)
    with pytest.raises(InvalidInput, match=r"train_texts\.jsonl:2: "):
        write_lmdb(tmp_path, "train")
    expect_all(LmdbPairs(split_dir))
    assert [path.name for path in split_dir.parent.iterdir()] == ["train"]


@pytest.mark.parametrize("moment", ["packing pictures", "packing pairs"])
def test_a_kill_leaves_the_old_lmdb(split_dir: Path, tmp_path: Path, moment: str) -> None:
    new_data(tmp_path)
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom tuwen.data.lmdb import write_lmdb\n"
        f"die = lambda done, total, what: os.kill(os.getpid(), {int(signal.SIGKILL)}) if what == {moment!r} else None\n"
        "write_lmdb(Path(sys.argv[1]), 'train', on_progress=die)"
    )
    result = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, check=False, timeout=120)
    assert result.returncode == -signal.SIGKILL
    assert isinstance(open_pairs(tmp_path, "train"), LmdbPairs)
    expect_all(LmdbPairs(split_dir))
    write_lmdb(tmp_path, "train")  # and a rerun is safe
    assert LmdbPairs(split_dir).image_bytes(1) == b"new"


def test_a_reader_keeps_the_old_data_until_it_reopens(split_dir: Path, tmp_path: Path) -> None:
    reader = LmdbPairs(split_dir)
    assert write_lmdb(new_data(tmp_path), "train") == split_dir
    expect_all(reader)
    assert LmdbPairs(split_dir).image_ids == [1]


# --- processes ----------------------------------------------------------------------------------------------


class Encoded(Dataset[bytes]):
    """What a DataLoader worker does: read pictures of a set opened by the parent."""

    def __init__(self, pairs: LmdbPairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> bytes:
        return self.pairs.image_bytes(self.pairs.image_ids[index])


@pytest.mark.parametrize("used_before", [False, True])
def test_forked_workers_read(split_dir: Path, used_before: bool) -> None:
    pairs = LmdbPairs(split_dir)
    if used_before:
        expect_all(pairs)
    loader = DataLoader(Encoded(pairs), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    for _ in range(2):
        assert list(loader) == [picture(red) for red in (4, 30, 200)]
    expect_all(pairs)


def test_spawned_workers_read(split_dir: Path) -> None:
    pairs = LmdbPairs(split_dir)
    expect_all(pairs)
    copy = pickle.loads(pickle.dumps(pairs))  # noqa: S301
    expect_all(copy)


def test_two_readers_of_a_split_and_closing_one(split_dir: Path) -> None:
    first = LmdbPairs(split_dir)
    with LmdbPairs(split_dir) as second:
        expect_all(second)
    expect_all(first)


@pytest.mark.parametrize("first_read", ["image_ids", "texts", "num_images"])
def test_a_closed_reader_opens_again_when_read(split_dir: Path, first_read: str) -> None:
    pairs = LmdbPairs(split_dir)
    pairs.close()
    assert getattr(pairs, first_read)


def test_closing_lets_go_of_the_files(split_dir: Path) -> None:
    with LmdbPairs(split_dir) as pairs:
        expect_all(pairs)
    # LMDB refuses to open a file that this process still holds.
    lmdb.open(str(split_dir / "imgs"), readonly=True, lock=False).close()


# --- one way in ---------------------------------------------------------------------------------------------


def test_open_pairs_prefers_the_lmdb(split_dir: Path, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "lmdb"):
        pairs = open_pairs(path, "train")
        assert isinstance(pairs, LmdbPairs)
        assert pairs.split_dir == split_dir


def test_both_forms_read_alike(split_dir: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "tsv")
    plain, packed = open_pairs(tmp_path / "tsv", "train"), LmdbPairs(split_dir)
    assert list(plain.texts) == packed.texts
    assert sorted(plain.image_ids) == packed.image_ids
    assert all(plain.image_bytes(image_id) == packed.image_bytes(image_id) for image_id in plain.image_ids)


# --- small disks --------------------------------------------------------------------------------------------


def test_the_map_grows_by_steps_and_reserves_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows the file is as large as its map: it is doubled up to a step, and then grows by that."""
    step = 2**20
    monkeypatch.setattr(ours, "_INITIAL_MAP_BYTES", step // 4)
    monkeypatch.setattr(ours, "_MAX_GROWTH_BYTES", step)
    monkeypatch.setattr(ours, "_COMMIT_EVERY", 10)
    images = [ImageRecord(number, os.urandom(31_000)) for number in range(200)]
    split_dir = write_lmdb(write_split(tmp_path, images, [TextRecord(0, "x", (0,))]), "train")
    with lmdb.open(str(split_dir / "imgs"), map_size=0, readonly=True, lock=False) as environment:  # 0: as written
        reserved = environment.info()["map_size"]
    used = (split_dir / "imgs" / "data.mdb").stat().st_size
    assert used > 8 * step
    assert reserved - used <= 2 * step
    assert LmdbPairs(split_dir).image_bytes(199) == images[199].encoded
