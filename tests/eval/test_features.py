"""Features on disk: every input's rows are the engine's own, a bad item costs itself alone, a kill costs nothing."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval import feature_files
from eval.engine import Engine
from eval.feature_files import fingerprint_of, iter_features, open_features, read_manifest
from eval.feature_sources import Side, open_source
from eval.features import EngineChoice, FeatureJob, parts_by_engine, read_ahead, write_features
from eval.ray_features import PartEmbedder, shares
from eval.torch_engine import TorchEngine
from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import shape_pairs, write_pairs
from tuwen.checkpoint import save_checkpoint
from tuwen.data.lmdb import write_lmdb
from tuwen.data.pairs import jsonl_path, tsv_path
from tuwen.data.shards import write_shards
from tuwen.errors import InvalidInput

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(random_model(SMALL_SPECS["vit"]), batch_size=4)


def write(engine: Engine, job: FeatureJob) -> dict[Side, tuple[list[int] | list[str], np.ndarray]]:
    """What lies on disk afterwards, by side."""
    done = write_features(job, engine, "torch", parts_by_engine(engine))
    return {one.side: open_features(one.folder) for one in done}


# --- inputs ---------------------------------------------------------------------------------------------------------


def make_tsv(folder: Path) -> Path:
    write_pairs(folder, "valid", shape_pairs())
    return folder


def make_lmdb(folder: Path) -> Path:
    write_lmdb(make_tsv(folder), "valid")
    for path in folder.glob("valid_*"):
        path.unlink()
    return folder


def make_lmdb_split(folder: Path) -> Path:
    return make_lmdb(folder) / "lmdb" / "valid"


def make_pictures(folder: Path) -> Path:
    for image_id, encoded in shape_pairs().images.items():
        path = folder / f"under{image_id % 3}" / f"{image_id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def make_parquet_of_paths(folder: Path) -> Path:
    make_pictures(folder / "pictures")
    names = [f"pictures/under{one % 3}/{one}.png" for one in shape_pairs().images]
    pq.write_table(pa.table({"image": names, "id": list(shape_pairs().images)}), folder / "list.parquet")
    return folder / "list.parquet"


def make_parquet_of_files(folder: Path) -> Path:
    """Two files of several row groups, with texts too."""
    pairs = shape_pairs()
    texts = [record.text for record in pairs.texts[: len(pairs.images)]]
    table = pa.table({"image": list(pairs.images.values()), "text": texts, "id": list(pairs.images)})
    folder.mkdir()
    pq.write_table(table.slice(0, 13), folder / "a.parquet", row_group_size=5)
    pq.write_table(table.slice(13), folder / "b.parquet", row_group_size=3)
    return folder


def make_shards(folder: Path) -> Path:
    write_shards(make_tsv(folder), "valid", folder / "shards", 3)
    return folder / "shards" / "valid" / "*.tsv"


@pytest.mark.parametrize(
    "make",
    [make_tsv, make_lmdb, make_lmdb_split, make_pictures, make_parquet_of_paths, make_parquet_of_files, make_shards],
)
@pytest.mark.parametrize("part_rows", [3, 100])
def test_pictures_of_every_input_are_the_engines(
    engine: Engine, tmp_path: Path, make: Callable[[Path], Path], part_rows: int
) -> None:
    """Each picture once, under its id, whatever the parts."""
    images = shape_pairs().images
    expected = dict(zip(images, engine.embed_images(images.values()), strict=True))
    job = FeatureJob(make(tmp_path / "data"), tmp_path / "out", sides=("images",), part_rows=part_rows, dtype="float32")
    ids, embeddings = write(engine, job)["images"]
    as_integers = [int(Path(str(one)).stem) for one in ids]
    assert sorted(as_integers) == sorted(images)
    assert embeddings.dtype == np.float32
    for image_id, row in zip(as_integers, embeddings, strict=True):
        np.testing.assert_allclose(row, expected[image_id], atol=1e-6)  # batches differ, and float32 with them


@pytest.mark.parametrize("make", [make_tsv, make_lmdb, make_parquet_of_files])
def test_texts_of_every_input_are_the_engines(engine: Engine, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """In the input's order, under their ids."""
    data = make(tmp_path / "data")
    records = shape_pairs().texts
    if make is make_parquet_of_files:
        expected_ids, texts = list(shape_pairs().images), [record.text for record in records[:20]]
    else:
        expected_ids, texts = [record.text_id for record in records], [record.text for record in records]
    job = FeatureJob(data, tmp_path / "out", sides=("texts",), part_rows=7, dtype="float32")
    ids, embeddings = write(engine, job)["texts"]
    assert ids == expected_ids
    np.testing.assert_allclose(embeddings, np.stack(list(engine.embed_texts(texts))), atol=1e-6)


def test_texts_of_shards_go_by_their_line(engine: Engine, tmp_path: Path) -> None:
    """A caption a line, through the shards in order of their names."""
    pattern = make_shards(tmp_path / "data")
    lines = [line for path in sorted(pattern.parent.glob("*.tsv")) for line in path.read_text().splitlines()]
    source = open_source(pattern, "", "texts")
    assert list(source.read(0, len(source))) == [(row, line.split("\t")[2]) for row, line in enumerate(lines)]
    assert [text for _, text in source.read(19, 23)] == [line.split("\t")[2] for line in lines[19:23]]


def test_a_parquet_list_without_ids_goes_by_path_or_row(tmp_path: Path) -> None:
    """Rows are counted through all files."""
    make_pictures(tmp_path / "pictures")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    pq.write_table(pa.table({"image": names}), tmp_path / "paths.parquet")
    assert [one for one, _ in open_source(tmp_path / "paths.parquet", "", "images").read(2, 5)] == names[2:5]
    (tmp_path / "texts").mkdir()
    for name in "ab":
        pq.write_table(pa.table({"text": ["红", "绿", "蓝"]}), tmp_path / "texts" / f"{name}.parquet")
    assert list(open_source(tmp_path / "texts", "", "texts").read(2, 5)) == [(2, "蓝"), (3, "红"), (4, "绿")]


def test_without_a_choice_every_side_is_embedded(engine: Engine, tmp_path: Path) -> None:
    """Of pairs both, of a folder of pictures the pictures; a side can be added later."""
    assert set(write(engine, FeatureJob(make_tsv(tmp_path / "pairs"), tmp_path / "a"))) == {"images", "texts"}
    assert set(write(engine, FeatureJob(make_pictures(tmp_path / "pictures"), tmp_path / "b"))) == {"images"}
    assert set(write(engine, FeatureJob(make_parquet_of_files(tmp_path / "list"), tmp_path / "c"))) == {
        "images",
        "texts",
    }
    write(engine, FeatureJob(tmp_path / "pairs", tmp_path / "d", sides=("texts",)))
    write(engine, FeatureJob(tmp_path / "pairs", tmp_path / "d", sides=("images",)))
    assert contents(tmp_path / "a") == contents(tmp_path / "d")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: tsv_path(data, "valid").unlink(), r"no split 'valid' as LMDB or as valid_imgs.tsv"),
        (lambda data: tsv_path(data, "valid").write_text("nonsense\n"), r"valid_imgs.tsv:1: image id is 'nonsense'"),
        (lambda data: tsv_path(data, "valid").write_text("7\tAAAA\n7\tAAAA\n"), r"image id 7 appears twice"),
        (lambda data: tsv_path(data, "valid").write_text(""), r"valid_imgs.tsv: has no images"),
    ],
)
def test_an_input_without_ids_is_refused(
    engine: Engine, tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    """Before anything is embedded or written."""
    write_pairs(tmp_path / "data", "test", shape_pairs())
    spoil(make_tsv(tmp_path / "data"))
    with pytest.raises(InvalidInput, match=reason):
        write(engine, FeatureJob(tmp_path / "data", tmp_path / "out", sides=("images",)))
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_named(engine: Engine, tmp_path: Path) -> None:
    """A folder, a glob, a column, texts."""
    make_pictures(tmp_path / "pictures")
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "odd.parquet")
    pq.write_table(pa.table({"image": [1.5]}), tmp_path / "number.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    for name, side, reason in (
        ("nowhere", "images", "nowhere: there is no such folder"),
        ("nowhere/*.tsv", "images", "no file of that name"),
        ("pictures", "texts", "pictures: has no texts"),
        ("odd.parquet", "images", "odd.parquet: no column 'image', it has picture"),
        ("number.parquet", "images", "column 'image' is double, expected paths or picture files"),
        ("broken.parquet", "images", "broken.parquet: not a Parquet file"),
    ):
        with pytest.raises(InvalidInput, match=reason.replace("*", r"\*")):
            open_source(tmp_path / name, "valid", side)  # type: ignore[arg-type]


# --- what cannot be embedded ----------------------------------------------------------------------------------------


def test_a_bad_picture_costs_itself_alone(engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Logged, counted, and listed with the reason; one that is no picture and one whose base64 is broken."""
    data = make_tsv(tmp_path / "data")
    good_ids, good = write(engine, FeatureJob(data, tmp_path / "good", sides=("images",), part_rows=6))["images"]
    pairs = shape_pairs()
    pairs.images[107] = b"no picture"
    write_pairs(data, "valid", pairs)
    lines = tsv_path(data, "valid").read_text().splitlines()
    lines[13] = "113\t***"
    tsv_path(data, "valid").write_text("\n".join(lines))
    job = FeatureJob(data, tmp_path / "out", sides=("images",), part_rows=6)
    (done,) = write_features(job, engine, "torch", parts_by_engine(engine))
    assert (done.num_items, done.num_embedded, done.num_skipped) == (20, 18, 2)
    listed = [json.loads(line) for line in (done.folder / "skipped.jsonl").read_text().splitlines()]
    assert [one["id"] for one in listed] == [107, 113]
    assert "not a readable picture" in listed[0]["reason"]
    assert "bad base64" in listed[1]["reason"]
    assert [record.message.split(":")[0] for record in caplog.records] == ["skipped 107", "skipped 113"]
    ids, embeddings = open_features(done.folder)
    kept = [row for row, one in enumerate(good_ids) if one not in (107, 113)]
    assert ids == [good_ids[row] for row in kept]
    np.testing.assert_allclose(embeddings.astype(np.float32), good[kept].astype(np.float32), atol=1e-3)


def test_a_part_of_bad_pictures_alone_is_an_empty_part(engine: Engine, tmp_path: Path) -> None:
    """And the features around it are read as before."""
    data = make_pictures(tmp_path / "data")
    for path in (data / "under0").iterdir():
        path.write_bytes(b"")
    job = FeatureJob(data, tmp_path / "out", part_rows=4, single_file=True)
    (done,) = write_features(job, engine, "torch", parts_by_engine(engine))
    ids, embeddings = open_features(done.folder)
    assert (done.num_skipped, len(ids), len(embeddings)) == (6, 14, 14)
    assert not [one for one in ids if str(one).startswith("under0")]
    assert open_features(done.files[0])[0] == ids


def test_a_missing_file_and_an_empty_cell_are_skipped(engine: Engine, tmp_path: Path) -> None:
    """Of a Parquet list."""
    make_pictures(tmp_path / "pictures")
    names = ["pictures/under1/100.png", "pictures/gone.png", None]
    pq.write_table(pa.table({"image": names, "id": ["a", "b", "c"]}), tmp_path / "list.parquet")
    job = FeatureJob(tmp_path / "list.parquet", tmp_path / "out")
    assert write(engine, job)["images"][0] == ["a"]
    listed = [json.loads(line) for line in (tmp_path / "out" / "images" / "skipped.jsonl").read_text().splitlines()]
    assert [one["id"] for one in listed] == ["b", "c"]
    assert listed[0]["reason"] == "cannot be read: No such file or directory"


# --- going on -------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, those under temporary names too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_missing_is_embedded_again(engine: Engine, tmp_path: Path) -> None:
    """With the same bytes, and progress that starts where it stood."""
    job = FeatureJob(make_tsv(tmp_path / "data"), tmp_path / "out", part_rows=6, single_file=True, jsonl=True)
    write(engine, job)
    before = contents(job.out)
    (job.out / "images" / "000001.parquet").unlink()
    (job.out / "images" / ".000001.parquet.99").write_bytes(b"what a kill left")
    heard: list[tuple[int, int, str]] = []
    images, texts = write_features(
        job, engine, "torch", parts_by_engine(engine), lambda done, total, what: heard.append((done, total, what))
    )
    assert (images.num_resumed, texts.num_resumed) == (14, 25)
    assert [done for done, _, what in heard if what == "images"] == [14, *range(15, 21), 20]
    assert contents(job.out) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "was begun with --dtype float16, now float32; give the same, or remove it"),
        ({"part_rows": 5}, "was begun with --part-rows 6, now 5"),
        ({"data": "other"}, r"its input has changed since it was begun \(20 images in .*, now 20 in "),
        ({"split": "test"}, r"its input has changed since it was begun \(20 images in .*, now 19 in "),
    ],
)
def test_what_was_begun_otherwise_is_not_gone_on_with(
    engine: Engine, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    """One sentence, and the folder stays as it is."""
    values = {"data": make_tsv(tmp_path / "data"), "out": tmp_path / "out", "part_rows": 6, "sides": ("images",)}
    write(engine, FeatureJob(**values))  # type: ignore[arg-type]
    fewer = shape_pairs()
    del fewer.images[119]
    fewer.texts.clear()
    write_pairs(tmp_path / "data", "test", fewer)
    changed = shape_pairs()
    changed.images[100] = changed.images[101]
    write_pairs(tmp_path / "other", "valid", changed)
    if "data" in change:
        change = {"data": tmp_path / "other"}
    before = contents(tmp_path / "out")
    with pytest.raises(InvalidInput, match=reason):
        write(engine, FeatureJob(**(values | change)))  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == before


def test_another_model_does_not_go_on(engine: Engine, tmp_path: Path) -> None:
    """Even one of the same shape."""
    job = FeatureJob(make_tsv(tmp_path / "data"), tmp_path / "out")
    write(engine, job)
    model = random_model(SMALL_SPECS["vit"])
    model.text_projection.data += 0.1
    with pytest.raises(InvalidInput, match=f"was begun with model Small-ViT of fingerprint {engine.fingerprint}, this"):
        write(TorchEngine(model), job)


def test_parts_without_a_manifest_are_not_gone_on_with(engine: Engine, tmp_path: Path) -> None:
    """Nobody knows what they are of."""
    job = FeatureJob(make_tsv(tmp_path / "data"), tmp_path / "out", sides=("images",))
    write(engine, job)
    (job.out / "images" / "manifest.json").unlink()
    with pytest.raises(InvalidInput, match=r"images: holds 000000.parquet and no manifest.json; remove it, or name"):
        write(engine, job)


def test_changed_texts_are_noticed_and_touched_ones_are_not(engine: Engine, tmp_path: Path) -> None:
    """Their digest is of the texts."""
    job = FeatureJob(make_tsv(tmp_path / "data"), tmp_path / "out", sides=("texts",))
    write(engine, job)
    path = jsonl_path(job.data, "valid")
    os.utime(path, (0, 0))
    write(engine, job)
    path.write_text(path.read_text().replace("红圆", "红点"))
    with pytest.raises(InvalidInput, match="its input has changed"):
        write(engine, job)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tuwen.cli", "features", *map(str, arguments)]


ONE_THREAD = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
}


@pytest.fixture
def many_pictures(tmp_path: Path) -> Path:
    """1,200 pictures, one of them broken, so that a run lasts long enough to be killed in its midst."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(1200):
        pixels = noise.integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.bmp")
    (folder / "0700.bmp").write_bytes(b"broken")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(random_model(SMALL_SPECS["vit"]), tmp_path / "model")
    return tmp_path / "model"


def test_killed_three_times_it_ends_as_if_it_had_not_been(
    tmp_path: Path, many_pictures: Path, checkpoint: Path
) -> None:
    """SIGKILL at random points: all files are, byte for byte, those of an uninterrupted run."""
    options = ("--checkpoint", checkpoint, "--data", many_pictures, "--part-rows", 20, "--single-file", "--jsonl")
    subprocess.run(command(*options, "--out", tmp_path / "whole"), check=True, env=ONE_THREAD, capture_output=True)
    out = tmp_path / "killed"
    chance = random.Random()
    for least in (2, 15, 28):  # of 60 parts
        num_parts = least + chance.randrange(10)
        process = subprocess.Popen(command(*options, "--out", out), env=ONE_THREAD, stderr=subprocess.PIPE)
        while len(list(out.glob("images/0*.parquet"))) < num_parts:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert least <= len(list(out.glob("images/0*.parquet"))) < 60
        assert not (tmp_path / "killed" / "images.parquet").exists()
    ended = subprocess.run(command(*options, "--out", out, "--json"), check=True, env=ONE_THREAD, capture_output=True)
    (result,) = json.loads(ended.stdout)
    assert (result["num_items"], result["num_embedded"], result["num_skipped"]) == (1200, 1199, 1)
    assert 28 * 20 <= result["num_resumed"] < 1200
    assert contents(out) == contents(tmp_path / "whole")
    ids, _ = open_features(out / "images")
    assert ids == [f"{number:04d}.bmp" for number in range(1200) if number != 700]


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-4), ("float32", 0)])
def test_every_form_holds_the_same_numbers(
    engine: Engine, tmp_path: Path, dtype: feature_files.Dtype, tolerance: float
) -> None:
    """Parts, the single file, and the JSONL; float16 is within its rounding (2**-11) of what was embedded."""
    images = shape_pairs().images
    job = FeatureJob(make_tsv(tmp_path / "data"), tmp_path / "out", dtype=dtype, single_file=True, jsonl=True)
    write(engine, job)
    expected = np.stack(list(engine.embed_images(images.values())))
    for name in ("images", "images.parquet", "images.img_feat.jsonl"):
        ids, embeddings = open_features(job.out / name)
        assert ids == list(images)
        np.testing.assert_allclose(embeddings.astype(np.float32), expected, atol=tolerance)
        assert embeddings.dtype == (np.float32 if name.endswith("jsonl") else dtype)
    assert {path.name for path in job.out.iterdir()} == {
        "images", "texts", "images.parquet", "texts.parquet", "images.img_feat.jsonl", "texts.txt_feat.jsonl",
    }  # fmt: skip


def test_other_readers_understand_the_parquet(engine: Engine, tmp_path: Path) -> None:
    """A plain table of id and a fixed-size list, and the model's identity in its metadata."""
    job = FeatureJob(make_tsv(tmp_path / "data"), tmp_path / "out", single_file=True)
    write(engine, job)
    schema = pq.read_schema(job.out / "images.parquet")
    assert schema.names == ["id", "embedding"]
    assert (str(schema.field("id").type), schema.field("embedding").type.list_size) == ("int64", 32)
    assert pq.read_table(job.out / "images.parquet").num_rows == 20
    assert fingerprint_of(job.out / "images.parquet") == fingerprint_of(job.out / "images") == engine.fingerprint


def test_the_jsonl_is_chinese_clips(engine: Engine, tmp_path: Path) -> None:
    """Its keys, an object a line; and one written by others is read."""
    job = FeatureJob(make_tsv(tmp_path / "data"), tmp_path / "out", jsonl=True)
    write(engine, job)
    first = json.loads((job.out / "texts.txt_feat.jsonl").read_text().splitlines()[0])
    assert (list(first), first["text_id"], len(first["feature"])) == (["text_id", "feature"], 0, 32)
    assert fingerprint_of(job.out / "texts.txt_feat.jsonl") is None
    write(engine, FeatureJob(make_pictures(tmp_path / "pictures"), tmp_path / "by_path", jsonl=True))
    first = json.loads((tmp_path / "by_path" / "images.img_feat.jsonl").read_text().splitlines()[0])
    assert first["image_id"] == "under0/102.png"
    path = tmp_path / "theirs.jsonl"
    path.write_text('{"image_id": 7, "feature": [0.5, 1]}\n\n{"feature": [0.25, 2], "image_id": 8}\n')
    ids, embeddings = open_features(path)
    assert (ids, embeddings.tolist()) == ([7, 8], [[0.5, 1.0], [0.25, 2.0]])


def test_large_features_are_mapped_and_blocks_are_small(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, in a file that has no name."""
    job = FeatureJob(make_tsv(tmp_path / "data"), tmp_path / "out", part_rows=6, jsonl=True)
    held = write(engine, job)["images"][1]
    monkeypatch.setattr(feature_files, "LARGE_BYTES", 100)
    mapped = open_features(job.out / "images")[1]
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, held)
    for name, lengths in (("images", [4, 2, 4, 2, 4, 2, 2]), ("images.img_feat.jsonl", [4] * 5)):
        blocks = list(iter_features(job.out / name, block_rows=4))
        assert [len(rows) for _, rows in blocks] == lengths
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]).astype(np.float16), held)


def test_features_that_cannot_be_read_are_named(engine: Engine, tmp_path: Path) -> None:
    """A folder of both sides, one that is not complete, a damaged part, other files."""
    job = FeatureJob(make_tsv(tmp_path / "data"), tmp_path / "out", part_rows=6)
    write(engine, job)
    (job.out / "images" / "000002.parquet").unlink()
    (job.out / "texts" / "000000.parquet").write_bytes(b"cut")
    pq.write_table(pa.table({"id": [1], "embedding": [[1.0]]}), tmp_path / "lists.parquet")
    (tmp_path / "odd.jsonl").write_text('{"image_id": 1, "feature": [1]}\n{"image_id": 2}\n')
    (tmp_path / "uneven.jsonl").write_text('{"image_id": 1, "feature": [1]}\n{"image_id": 2, "feature": [1, 2]}\n')
    for name, reason in (
        ("out", "holds features of images and texts; name one, as "),
        ("out/images", "not complete, 1 of 4 parts are missing; run `tuwen features` as before"),
        ("out/texts", "000000.parquet: not a Parquet file that can be read"),
        ("data", "no folder of features, manifest.json: No such file"),
        ("nowhere", "there are no such features"),
        ("lists.parquet", "expected columns id, and embedding, a fixed-size list"),
        ("odd.jsonl", "odd.jsonl:2: field 'feature' is missing"),
        ("uneven.jsonl", "uneven.jsonl:2: 2 values, the lines before have 1"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            open_features(tmp_path / name)


def test_reading_ahead_is_bounded() -> None:
    """And keeps the order."""
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    ahead = read_ahead(items())
    assert [next(ahead) for _ in range(10)] == list(range(10))
    time.sleep(0.05)
    assert len(taken) <= 10 + 64
    assert list(ahead) == list(range(10, 1000))


# --- Ray ------------------------------------------------------------------------------------------------------------


def test_an_actor_makes_the_parts_of_an_engine(tmp_path: Path, checkpoint: Path) -> None:
    """What Ray calls, without Ray: the same bytes, or the reason why there are none."""
    job = FeatureJob(make_tsv(tmp_path / "data"), tmp_path / "out", sides=("images",), part_rows=6)
    choice = EngineChoice("torch", checkpoint, batch_size=4)
    with choice.open() as engine:
        (done,) = write_features(job, engine, "ray", parts_by_engine(engine))
    source, manifest = open_source(job.data, "valid", "images"), read_manifest(done.folder)
    actor = PartEmbedder(choice, pickle.loads(pickle.dumps(source)), manifest)  # noqa: S301
    (content,) = actor({"number": np.array([2])})["content"]
    assert content == (done.folder / "000002.parquet").read_bytes()
    for other, reason in (
        (EngineChoice("torch", tmp_path / "nowhere"), "there is no such checkpoint"),
        (EngineChoice("torch", ROOT / "samples" / "emoji_tiny"), "emoji_tiny: is another model on another machine"),
    ):
        answer = PartEmbedder(other, source, manifest)({"number": np.array([2])})
        assert answer["content"][0] == b""
        assert reason in answer["error"][0]


@pytest.mark.parametrize(
    ("machines", "device", "num_workers", "expected"),
    [
        ([{"CPU": 2.0}], "cpu", None, (1, 2, 0)),
        ([{"CPU": 2.0}], "cpu", 2, (2, 1, 0)),
        ([{"CPU": 2.0}], "cpu", 3, (3, 1, 0)),
        ([{"CPU": 0.0}, {"CPU": 16.0}, {"CPU": 8.0, "GPU": 2.0}], "cpu", None, (2, 8, 0)),
        ([{"CPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}], "cuda", None, (6, 2, 1)),
    ],
)
def test_actors_fit_on_the_machines(
    machines: list[dict[str, float]], device: str, num_workers: int | None, expected: tuple[int, int, int]
) -> None:
    """(actors, CPUs, GPUs): one a machine or a GPU, and none larger than the smallest machine."""
    assert shares(machines, device, num_workers) == expected


def test_ray_without_a_gpu_says_so() -> None:
    with pytest.raises(InvalidInput, match="no machine of the cluster has a GPU"):
        shares([{"CPU": 8.0}], "cuda", None)


@pytest.mark.slow
def test_ray_writes_the_same_parts(tmp_path: Path, many_pictures: Path, checkpoint: Path) -> None:
    """Two actors here: the numbers of PyTorch, the broken picture skipped, and a second run makes what is missing."""
    pytest.importorskip("ray.data")
    options = ("--checkpoint", checkpoint, "--data", many_pictures, "--part-rows", 200, "--json")
    over_ray = ("--engine", "ray", "--workers", 2, "--out", tmp_path / "ray")
    subprocess.run(command(*options, "--out", tmp_path / "torch"), check=True, env=ONE_THREAD, capture_output=True)
    subprocess.run(command(*options, *over_ray), check=True, env=ONE_THREAD, capture_output=True)
    whole = contents(tmp_path / "ray")
    ids, embeddings = open_features(tmp_path / "ray" / "images")
    expected_ids, expected = open_features(tmp_path / "torch" / "images")
    assert ids == expected_ids
    np.testing.assert_allclose(embeddings.astype(np.float32), expected.astype(np.float32), atol=1e-3)
    for number in (1, 4):
        (tmp_path / "ray" / "images" / f"{number:06d}.parquet").unlink()
    ended = subprocess.run(command(*options, *over_ray), check=True, env=ONE_THREAD, capture_output=True)
    (result,) = json.loads(ended.stdout)
    assert (result["num_embedded"], result["num_skipped"], result["num_resumed"]) == (1199, 1, 800)
    assert contents(tmp_path / "ray") == whole
    torch_goes_on = command(*options, "--out", tmp_path / "ray")
    refused = subprocess.run(torch_goes_on, env=ONE_THREAD, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "was begun with --engine ray, now torch" in refused.stderr
