"""Features of a teacher on disk: what was written is what is read, a kill loses a part, and a gap is a sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import shape_pairs, write_pairs
from training.batch import Batch, InputIds, Positives
from training.distill import open_teacher
from training.recipe import DataSection, DistillSection
from training.teacher_features import StoredTeacher, text_key, write_teacher_features
from tuwen.checkpoint import load_checkpoint, save_checkpoint
from tuwen.data.lmdb import write_lmdb
from tuwen.data.pairs import TextRecord
from tuwen.embed import embed_images, embed_texts
from tuwen.errors import InvalidInput
from tuwen.tokenizer import default_tokenizer, normalize_text

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
PART_ROWS = 8  # so that 20 pictures are three parts, and 25 texts four
FILES = sorted(
    ["index.safetensors", "teacher.json"]
    + [f"images_{number:05}.safetensors" for number in range(3)]
    + [f"texts_{number:05}.safetensors" for number in range(4)]
)


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    save_checkpoint(random_model(SMALL_SPECS["vit"]), path, dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_pairs(folder, "train", shape_pairs())
    return folder


def data_of(*paths: Path, **values: object) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": path} for path in paths]} | values)


@pytest.fixture(scope="module")
def written(teacher_path: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "shapes"
    return write_teacher_features(teacher_path, data_of(shapes), out, batch_size=3, part_rows=PART_ROWS)


def ids_of(text: str) -> InputIds:
    return tuple(default_tokenizer().encode_ids(normalize_text(text)))


def batch_of(image_ids: list[int], texts: list[str], unreadable: tuple[int, ...] = ()) -> Batch:
    """Pixels that no teacher has seen: a stored one must not look at them."""
    is_positive = torch.zeros(len(image_ids), len(texts), dtype=torch.bool)
    return Batch(
        epoch=0,
        number=0,
        image_ids=tuple(image_ids),
        pixels=torch.randint(256, (len(image_ids), 3, 32, 32), dtype=torch.uint8),
        is_readable=torch.tensor([image_id not in unreadable for image_id in image_ids]),
        texts=tuple(map(ids_of, texts)),
        positives=Positives(is_positive, is_positive.t()),
    )


def test_what_is_read_is_what_the_teacher_gives(written: Path, teacher_path: Path, shapes: Path) -> None:
    """In any order, the same one twice too; half precision, and of unit length again."""
    pairs, model = shape_pairs(), load_checkpoint(teacher_path)
    teacher = open_teacher(DistillSection(features=written, logit_weight=1), data_of(shapes), CPU)
    image_ids, texts = [119, 100, 107, 108, 119], ["黑横条", "红色", "红圆", "红色"]
    features = teacher.embed(batch_of(image_ids, texts))
    image_embeds = embed_images(model, (pairs.images[image_id] for image_id in image_ids))
    # float16 keeps 11 bits of numbers below 1.
    torch.testing.assert_close(features.image_embeds, torch.from_numpy(image_embeds), rtol=0, atol=5e-4)
    torch.testing.assert_close(features.text_embeds, torch.from_numpy(embed_texts(model, texts)), rtol=0, atol=5e-4)
    for embeds in (features.image_embeds, features.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(len(embeds)))
    assert features.logit_scale.item() == pytest.approx(model.logit_scale.item())
    assert teacher.embed_dim == 32


def test_the_folder_is_as_documented(written: Path) -> None:
    """Parts of so many rows, under the names that docs give, in half precision."""
    assert sorted(path.name for path in written.iterdir()) == FILES
    first, last = load_file(written / "images_00000.safetensors"), load_file(written / "texts_00003.safetensors")
    assert {name: (value.dtype, tuple(value.shape)) for name, value in first.items()} == {
        "image_ids": (torch.int64, (8,)), "image_embeds": (torch.float16, (8, 32))
    }  # fmt: skip
    assert {name: (value.dtype, tuple(value.shape)) for name, value in last.items()} == {
        "text_keys": (torch.int64, (1,)), "text_embeds": (torch.float16, (1, 32))
    }  # fmt: skip
    assert json.loads((written / "teacher.json").read_text())["format"] == "tuwen-teacher-features-1"


def test_the_key_of_a_text_never_changes() -> None:
    """Files outlive programs: SHA-256 of the ids as little-endian int32, its first 63 bits."""
    assert text_key((101, 671, 102)) == 527147448620899337
    assert text_key((101, 671, 102, 0)) != text_key((101, 671, 102))


@pytest.mark.parametrize("kept", [0, 1, 4, 6])
def test_a_kill_loses_a_part_at_most(
    written: Path, teacher_path: Path, shapes: Path, tmp_path: Path, kept: int
) -> None:
    """Stopped while it makes part `kept`, it goes on there; what was written stays, and the end is the same."""
    out, parts = tmp_path / "features", [name for name in FILES if "0" in name]

    class Killed(Exception):
        pass

    def kill(done: int, total: int, what: str) -> None:
        if len(list(out.glob("*_0*.safetensors"))) == kept:
            raise Killed

    data = data_of(shapes)
    with pytest.raises(Killed):
        write_teacher_features(teacher_path, data, out, batch_size=3, part_rows=PART_ROWS, on_progress=kill)
    assert sorted(path.name for path in out.glob("*.safetensors")) == parts[:kept]
    times = [(out / name).stat().st_mtime_ns for name in parts[:kept]]
    with pytest.raises(InvalidInput, match=r"not complete, index\.safetensors is missing"):
        StoredTeacher(out, data, CPU)
    write_teacher_features(teacher_path, data, out, batch_size=3, part_rows=PART_ROWS)
    assert [(out / name).stat().st_mtime_ns for name in parts[:kept]] == times
    for name in FILES:
        assert (out / name).read_bytes() == (written / name).read_bytes(), name


def test_progress_is_told(teacher_path: Path, shapes: Path, tmp_path: Path) -> None:
    """How many of all, first of pictures, then of texts; at once what is there already."""
    told: list[tuple[int, int, str]] = []
    for _ in range(2):
        told.append((0, 0, "again"))
        write_teacher_features(
            teacher_path, data_of(shapes), tmp_path / "features", None, 10, lambda *one: told.append(one), 15
        )
    first, second = told[1 : told.index((0, 0, "again"), 1)], told[told.index((0, 0, "again"), 1) + 1 :]
    assert list(dict.fromkeys(first)) == [
        (10, 20, "embedding images"), (15, 20, "embedding images"), (20, 20, "embedding images"),
        (10, 25, "embedding texts"), (15, 25, "embedding texts"), (25, 25, "embedding texts"),
    ]  # fmt: skip
    assert second == [
        (15, 20, "embedding images"), (20, 20, "embedding images"),
        (15, 25, "embedding texts"), (25, 25, "embedding texts"),
    ]  # fmt: skip


def test_an_lmdb_and_a_second_source_are_read_too(teacher_path: Path, shapes: Path, tmp_path: Path) -> None:
    """Texts that both have are embedded once."""
    pairs = shape_pairs()
    other = replace(
        pairs,
        images={image_id + 1000: encoded for image_id, encoded in pairs.images.items()},
        texts=[TextRecord(1, "红圆", (1100,)), TextRecord(2, "别的", (1100,))],
    )
    write_pairs(tmp_path / "other", "train", other)
    write_lmdb(tmp_path / "other", "train")
    data = data_of(shapes, tmp_path / "other")
    teacher = StoredTeacher(write_teacher_features(teacher_path, data, tmp_path / "features"), data, CPU)
    features = teacher.embed(batch_of([103, 1103], ["别的", "红圆"]))
    assert torch.equal(features.image_embeds[0], features.image_embeds[1])
    assert load_file(tmp_path / "features" / "texts_00000.safetensors")["text_keys"].shape == (26,)


def test_an_unreadable_picture_is_left_out(teacher_path: Path, tmp_path: Path) -> None:
    """As many as max_corrupt; it has no features, and in a batch, where it counts for nothing, needs none."""
    pairs = shape_pairs()
    pairs.images[104] = b"no picture"
    write_pairs(tmp_path, "train", pairs)
    out = tmp_path / "features"
    with pytest.raises(InvalidInput, match=r"picture 104 is unreadable, and data\.max_corrupt is 0"):
        write_teacher_features(teacher_path, data_of(tmp_path), out, batch_size=2, part_rows=4)
    assert (out / "images_00000.safetensors").is_file()
    data = data_of(tmp_path, max_corrupt=1)
    teacher = StoredTeacher(write_teacher_features(teacher_path, data, out, batch_size=2, part_rows=4), data, CPU)
    features = teacher.embed(batch_of([103, 104, 105], ["红圆"], unreadable=(104,)))
    assert features.image_embeds.norm(dim=1).tolist() == pytest.approx([1, 0, 1])
    # Rows of later parts are where they were: its own lacks one.
    whole = embed_images(load_checkpoint(teacher_path), (pairs.images[image_id] for image_id in (105, 119)))
    later = teacher.embed(batch_of([105, 119], ["红圆"])).image_embeds
    torch.testing.assert_close(later, torch.from_numpy(whole), rtol=0, atol=5e-4)
    with pytest.raises(InvalidInput, match="no features of picture 104; they are of other data"):
        teacher.embed(batch_of([103, 104], ["红圆"]))


@pytest.mark.parametrize("missing", [-5, 99, 1000])
def test_what_is_not_there_is_a_sentence(written: Path, shapes: Path, missing: int) -> None:
    """Before the first id, between, and after the last; and a text."""
    teacher = StoredTeacher(written, data_of(shapes), CPU)
    with pytest.raises(InvalidInput, match=f"no features of picture {missing}; they are of other data"):
        teacher.embed(batch_of([100, missing], ["红圆"]))
    with pytest.raises(InvalidInput, match=r"no features of text with the key \d+; they are of other data"):
        teacher.embed(batch_of([100], ["红圆", "没见过的"]))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"join_captions": 0.5}, r"data\.join_captions makes new captions"),
        ({"drop_tokens": 0.1}, r"data\.drop_tokens makes new captions"),
        ({"context_length": 20}, r"of texts cut to 52 tokens, data\.context_length is 20"),
    ],
)
def test_new_captions_have_no_stored_features(
    written: Path, shapes: Path, values: dict[str, float], sentence: str
) -> None:
    """Refused before anything runs."""
    with pytest.raises(InvalidInput, match=sentence):
        StoredTeacher(written, data_of(shapes, **values), CPU)


def test_features_of_two_kinds_never_mix(written: Path, teacher_path: Path, shapes: Path, tmp_path: Path) -> None:
    """Another teacher, other data and another length of texts are refused, and nothing is touched."""
    other = random_model(SMALL_SPECS["vit"])
    with torch.no_grad():
        other.text_projection[0, 0] += 1
    save_checkpoint(other, tmp_path / "other", dtype=torch.float32)
    pairs = shape_pairs()
    write_pairs(tmp_path, "train", replace(pairs, texts=pairs.texts[1:]))
    before = {path: path.stat().st_mtime_ns for path in written.iterdir()}
    for teacher, data in (
        (tmp_path / "other", data_of(shapes)),
        (teacher_path, data_of(tmp_path)),
        (teacher_path, data_of(shapes, context_length=20)),
    ):
        with pytest.raises(InvalidInput, match="holds features of another teacher or of other data"):
            write_teacher_features(teacher, data, written, part_rows=PART_ROWS)
    assert {path: path.stat().st_mtime_ns for path in written.iterdir()} == before


def test_sources_with_the_same_ids_are_refused(teacher_path: Path, shapes: Path, tmp_path: Path) -> None:
    """Features go by the picture's id."""
    write_pairs(tmp_path / "copy", "train", shape_pairs())
    with pytest.raises(InvalidInput, match="picture 100 is in another source too"):
        write_teacher_features(teacher_path, data_of(shapes, tmp_path / "copy"), tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_a_stream_is_refused(teacher_path: Path, tmp_path: Path) -> None:
    data = DataSection(shards="*.tsv", unit="pair")
    with pytest.raises(InvalidInput, match=r"shards are read as a stream: distil from the teacher itself"):
        write_teacher_features(teacher_path, data, tmp_path / "features")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"no features of a teacher, teacher\.json: No such file"),
        ("{", "not a description of features"),
        ("[1]", "not a description of features"),
        ('{"fingerprint": 1}', "not a description of features"),
    ],
)
def test_a_folder_of_something_else_is_a_sentence(
    shapes: Path, tmp_path: Path, content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "teacher.json").write_text(content)
    with pytest.raises(InvalidInput, match=sentence):
        StoredTeacher(tmp_path, data_of(shapes), CPU)


def test_another_format_is_a_sentence(written: Path, shapes: Path, tmp_path: Path) -> None:
    values = json.loads((written / "teacher.json").read_text()) | {"format": "tuwen-teacher-features-9"}
    (tmp_path / "teacher.json").write_text(json.dumps(values))
    with pytest.raises(
        InvalidInput, match=r"format is 'tuwen-teacher-features-9', expected 'tuwen-teacher-features-1'"
    ):
        StoredTeacher(tmp_path, data_of(shapes), CPU)
