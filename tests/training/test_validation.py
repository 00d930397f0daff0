"""Validation: true recall of the whole set, accuracy on classes, in one process and in two; and bad folders named."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import COLOURS, SHAPES, draw_shape, shape_pairs
from training.init import freeze, keep_frozen_in_eval
from training.metrics import ValidationRecord
from training.recipe import Recipe
from training.validation import ZeroShotSet, open_zero_shot, validate
from tuwen.embed import embed_images, embed_texts, score_retrieval
from tuwen.errors import InvalidInput
from tuwen.model import ChineseCLIP
from tuwen.scoring import DEFAULT_TEMPLATES

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = [colour + shape for colour in COLOURS for shape in SHAPES]


def recipe_for(max_corrupt: int = 0, batch_size: int = 7) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"architecture": "Tiny-ViT"},
            "data": {"path": "data", "max_corrupt": max_corrupt},
            "optim": {"epochs": 1, "batch_size": 8},
            "valid": {"batch_size": batch_size},
            "run": {"out": "out"},
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A class for each kind of shape, with one or two pictures, whose folders sort as their labels stand."""
    root = tmp_path / "classes"
    for number, label in enumerate(CLASSES):
        (root / f"n{number:03}").mkdir(parents=True)
        for copy in range(1 + number % 2):
            (root / f"n{number:03}" / f"{copy}.png").write_bytes(draw_shape(label[0], label[1:]))
    (root / "label_cn.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    return root


def test_it_is_the_recall_of_the_whole_set(small_model: ChineseCLIP) -> None:
    """As `tuwen eval retrieval`; in batches of any size, with the pictures' progress heard."""
    pairs, heard = shape_pairs(), []
    record = validate(small_model, recipe_for(), pairs, None, 30, 3, heard.append)
    scores = score_retrieval(small_model, pairs)
    assert (record.step, record.epoch, record.zero_shot_accuracy) == (30, 3, None)
    # One near tie of 25 queries may be decided otherwise in another batch.
    for name in ("text_to_image", "image_to_text"):
        mine, theirs = asdict(getattr(record, name)), asdict(scores[name])
        assert mine == pytest.approx(theirs, abs=0.05)
    assert record.mean_recall == pytest.approx(
        (record.text_to_image.mean_recall + record.image_to_text.mean_recall) / 2
    )
    assert record.elapsed_s > 0
    assert heard == [*(f"validating, {done} of 20 pictures" for done in (7, 14, 20)), ""]


def test_modes_are_afterwards_what_they_were() -> None:
    """Dropout is off meanwhile, so it repeats; BatchNorm's statistics stay; a frozen tower is still in eval mode."""
    model = random_model(SMALL_SPECS["resnet"])
    section = recipe_for().model.model_copy(update={"freeze_vision": True})
    freeze(model, section)
    model.train()
    keep_frozen_in_eval(model, section)
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    records = [validate(model, recipe_for(), shape_pairs(), None, 1, 1) for _ in range(2)]
    assert records[0].text_to_image == records[1].text_to_image
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


# --- zero-shot ------------------------------------------------------------------------------------------------------


def accuracy_by_hand(model: ChineseCLIP, classes: ZeroShotSet) -> float:
    """One picture and one class at a time."""
    means = [
        np.mean([embed_texts(model, [template.format(label)])[0] for template in DEFAULT_TEMPLATES], axis=0)
        for label in classes.labels
    ]
    prototypes = [mean / np.linalg.norm(mean) for mean in means]
    right = []
    for file, target in zip(classes.files, classes.targets, strict=True):
        picture = embed_images(model, iter([file.read_bytes()]))[0]
        right.append(max(range(len(prototypes)), key=lambda index: float(prototypes[index] @ picture)) == target)
    return sum(right) / len(right)


def test_zero_shot_accuracy_is_that_of_averaged_prompts(small_model: ChineseCLIP, folder: Path) -> None:
    classes = open_zero_shot(folder)
    record = validate(small_model, recipe_for(), shape_pairs(), classes, 1, 1)
    # A random model is right about one picture of 20; one near tie of 30 may be decided otherwise.
    assert record.zero_shot_accuracy == pytest.approx(accuracy_by_hand(small_model, classes), abs=1 / 30)


def test_a_perfect_model_is_always_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose prompts point where its pictures do; and never with labels and folders in another order."""
    model = random_model(SMALL_SPECS["vit"])
    vectors = {label: np.eye(20, 32, dtype=np.float32)[index] for index, label in enumerate(CLASSES)}
    prompts = {template.format(label): vector for label, vector in vectors.items() for template in DEFAULT_TEMPLATES}
    monkeypatch.setattr(
        "training.validation.embed_texts",
        lambda model, texts: np.stack([prompts.get(text, vectors[CLASSES[0]]) for text in texts]),
    )
    labels = [CLASSES[index] for index in range(20) for _ in range(1 + index % 2)]
    monkeypatch.setattr(
        "training.validation.embed_pixels",
        lambda model, pixels, *_: np.stack([vectors[label] for label, _ in zip(labels, pixels, strict=True)]),
    )
    assert validate(model, recipe_for(), shape_pairs(), open_zero_shot(folder), 1, 1).zero_shot_accuracy == 1
    (folder / "label_cn.txt").write_text("\n".join([*CLASSES[1:], CLASSES[0]]), encoding="utf-8")
    assert validate(model, recipe_for(), shape_pairs(), open_zero_shot(folder), 1, 1).zero_shot_accuracy == 0


def test_the_folders_order_is_that_of_the_labels(folder: Path) -> None:
    """Hidden entries, as file managers leave them, are none."""
    (folder / ".thumbnails").mkdir()
    (folder / "n000" / ".DS_Store").touch()
    classes = open_zero_shot(folder)
    assert classes.labels == tuple(CLASSES)
    assert len(classes.files) == 30
    for file, target in zip(classes.files, classes.targets, strict=True):
        assert file.parent.name == f"n{target:03}"


def test_equal_labels_are_one_class(folder: Path) -> None:
    """Which of two folders of that name a picture is from cannot be told by it."""
    lines = [*CLASSES[:19], CLASSES[0]]
    (folder / "label_cn.txt").write_text("\n".join(lines), encoding="utf-8-sig")
    classes = open_zero_shot(folder)
    assert classes.labels == tuple(CLASSES[:19])
    assert classes.targets[-2:] == (0, 0)


def test_unreadable_pictures_are_left_out_up_to_the_limit(small_model: ChineseCLIP, folder: Path) -> None:
    """The accuracy is that of the others; one more ends it, named."""
    for number in (1, 5):
        (folder / f"n{number:03}" / "0.png").write_bytes(b"no picture")
    classes = open_zero_shot(folder)
    readable = [index for index, file in enumerate(classes.files) if file.read_bytes() != b"no picture"]
    others = ZeroShotSet(
        classes.labels,
        tuple(classes.files[index] for index in readable),
        tuple(classes.targets[index] for index in readable),
    )
    assert len(readable) == 28
    record = validate(small_model, recipe_for(max_corrupt=2), shape_pairs(), classes, 1, 1)
    assert record.zero_shot_accuracy == pytest.approx(accuracy_by_hand(small_model, others), abs=1 / 28)
    with pytest.raises(InvalidInput, match=r"n005/0\.png: .*; data\.max_corrupt allows 1$"):
        validate(small_model, recipe_for(max_corrupt=1), shape_pairs(), classes, 1, 1)


def test_pictures_that_are_all_unreadable_give_no_accuracy(small_model: ChineseCLIP, folder: Path) -> None:
    for file in folder.glob("*/*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(InvalidInput, match="none of its pictures can be read"):
        validate(small_model, recipe_for(max_corrupt=99), shape_pairs(), open_zero_shot(folder), 1, 1)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (None, r"label_cn\.txt: missing, expected a Chinese label a line"),
        (b"", r"label_cn\.txt: empty"),
        ("\n".join(CLASSES[:19]).encode(), r"20 folders, but label_cn\.txt has 19 lines"),
        ("\n".join([*CLASSES, "红"]).encode(), r"20 folders, but label_cn\.txt has 21 lines"),
        ("\n".join([*CLASSES[:2], " ", *CLASSES[3:]]).encode(), r"label_cn\.txt:3: an empty line"),
        ("红圆\n".encode("gbk"), r"label_cn\.txt: cannot be read as UTF-8"),
    ],
)
def test_bad_labels_are_named(folder: Path, labels: bytes | None, reason: str) -> None:
    path = folder / "label_cn.txt"
    if labels is None:
        path.unlink()
    else:
        path.write_bytes(labels)
    with pytest.raises(InvalidInput, match=reason):
        open_zero_shot(folder)


def test_a_class_without_a_picture_is_named(folder: Path) -> None:
    (folder / "n004" / "0.png").unlink()
    with pytest.raises(InvalidInput, match=rf"n004: no picture is in this class \({CLASSES[4]}\)"):
        open_zero_shot(folder)
    with pytest.raises(InvalidInput, match="there is no such folder of classes"):
        open_zero_shot(folder / "nowhere")


# --- several processes ------------------------------------------------------------------------------------------------


def validate_as_one_of(rank: int, num_processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder.parent / "store"), num_processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_processes)
    record = validate_in_half_batches(folder)
    torch.save(asdict(record), folder.parent / f"record_{rank}.pt")
    dist.destroy_process_group()


def validate_in_half_batches(folder: Path) -> ValidationRecord:
    """21 pictures and 25 texts, which two processes cannot share evenly, and one zero-shot picture unreadable."""
    pairs = shape_pairs()
    pairs.images[5] = draw_shape("黑", "横条")
    model = random_model(SMALL_SPECS["vit"])
    return validate(model, recipe_for(max_corrupt=1, batch_size=4), pairs, open_zero_shot(folder), 7, 1)


def test_two_processes_give_the_record_of_one(folder: Path) -> None:
    """Both of them, the same one."""
    (folder / "n003" / "1.png").write_bytes(b"no picture")
    (folder / "n001" / "1.png").unlink()  # 29 are left, which two cannot share evenly either
    expected = asdict(validate_in_half_batches(folder))
    mp.spawn(validate_as_one_of, (2, folder), nprocs=2)
    records = [torch.load(folder.parent / f"record_{rank}.pt") for rank in range(2)]
    assert 0 < expected["zero_shot_accuracy"] < 1
    assert records[0] | {"elapsed_s": 0} == records[1] | {"elapsed_s": 0}
    # What a batch changes, 1e-7 of a cosine, decides none of 28: they are a thousand times that apart.
    assert records[0]["zero_shot_accuracy"] == expected["zero_shot_accuracy"]
    for way in ("text_to_image", "image_to_text"):  # one near tie may be decided otherwise in another batch
        assert records[0][way] == pytest.approx(expected[way], abs=0.05)
