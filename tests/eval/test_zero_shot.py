"""Zero-shot classification: the same answers as Chinese-CLIP's script, and what it makes of odd folders."""

from __future__ import annotations

import json
import sys
import types
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from eval.class_folders import read_class_folders
from eval.prompts import Task, find_task, general_task, load_tasks
from eval.submission import ModelSize, write_submission
from eval.torch_engine import TorchEngine
from eval.zero_shot import Scored, ZeroShotResult, build_classifier, evaluate_zero_shot, submission_rows
from perf.published import build_cn_clip, published_transform, published_twin
from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import COLOURS, SHAPES, draw_shape
from tuwen.errors import InvalidInput
from tuwen.image_transform import preprocess_image
from tuwen.retrieval import first_relevant_rank
from tuwen.scoring import load_classifier

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = [f"{colour}色" for colour in COLOURS]
TASK = Task("colours", "Colours", "accuracy", ("{}", "{}的图形", "一个“{}”A"))


@pytest.fixture
def engine() -> TorchEngine:
    return TorchEngine(random_model(SMALL_SPECS["vit"]))


def write_set(folder: Path, files: Mapping[str, bytes], labels: list[str] = LABELS) -> Path:
    """A set in Chinese-CLIP's layout; names are below test/."""
    for name, encoded in files.items():
        path = folder / "test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
    (folder / "label_cn.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    return folder


def colour_files() -> dict[str, bytes]:
    """Every shape of every colour, in the folder of its colour."""
    return {
        f"{number}/{shape}.png": draw_shape(colour, shape) for number, colour in enumerate(COLOURS) for shape in SHAPES
    }


def evaluate(
    engine: TorchEngine, folder: Path, task: Task = TASK, keep_probs: bool = False
) -> tuple[ZeroShotResult, Scored]:
    data = read_class_folders(folder)
    return evaluate_zero_shot(engine, data, task, build_classifier(engine, data.labels, task.templates), keep_probs)


# --- Chinese-CLIP's own script ------------------------------------------------------------------------------


@pytest.fixture
def published(cn_clip: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """cn_clip.eval.zeroshot_evaluation; its trainer and torchvision, which are not used here, are stubbed meanwhile."""
    names: dict[str, tuple[str, ...]] = {
        "cn_clip.training.main": ("convert_models_to_fp32",),
        "torchvision": (),
        "torchvision.transforms": ("Compose", "Resize", "ToTensor", "Normalize", "InterpolationMode"),
        "torchvision.datasets": (),
    }
    for name, attributes in names.items():
        stub = types.ModuleType(name)
        vars(stub).update(dict.fromkeys(attributes))
        monkeypatch.setitem(sys.modules, name, stub)
    vars(sys.modules["torchvision"])["datasets"] = sys.modules["torchvision.datasets"]
    import cn_clip.eval.zeroshot_evaluation as module

    return module


def test_the_script_gives_the_same(published: ModuleType, engine: TorchEngine, tmp_path: Path) -> None:
    """Its classifier, its probabilities in index.json's order, its top 1: its functions on cn_clip's model."""
    folder = write_set(tmp_path / "set", colour_files())
    order = np.random.default_rng(0).permutation(len(colour_files()))
    (folder / "index.json").write_text(json.dumps(order.tolist()))
    data = read_class_folders(folder)
    result, scored = evaluate(engine, folder, keep_probs=True)

    twin = published_twin(engine._model)
    (tmp_path / "index.json").write_text(json.dumps(order.tolist()))
    args = Namespace(gpu="cpu", context_length=52, index=str(tmp_path / "index.json"))
    templates = [lambda label, one=template: one.replace("{}", label) for template in TASK.templates]
    classifier = published.zero_shot_classifier(twin, LABELS, templates, args)
    files = [(data.root / file).read_bytes() for file in data.files]
    batches = [(torch.stack([published_transform(one, 32) for one in files]), torch.from_numpy(data.truth))]
    top1, outputs = published.run(twin, classifier, batches, args)

    ours = build_classifier(engine, data.labels, TASK.templates)
    # Two implementations of the same float32 sums.
    np.testing.assert_allclose(ours.text_embeds, classifier.T.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(np.stack(list(submission_rows(data, scored))), outputs.numpy(), atol=1e-4)
    assert result.top1 == top1
    assert 0 < top1 < 1  # neither nothing nor all, so that it can be wrong


def test_top_k_is_chinese_clips(published: ModuleType) -> None:
    """Counted on the same logits, 1, 3 and 5 of 12 labels."""
    random = np.random.default_rng(0)
    logits, truth = random.normal(size=(500, 12)).astype(np.float32), random.integers(0, 12, 500)
    logits[np.arange(500), truth] += 1.0
    theirs = published.accuracy(torch.from_numpy(logits), torch.from_numpy(truth), topk=(1, 3, 5))
    ranks = first_relevant_rank(logits, np.eye(12, dtype=bool)[truth])
    assert [float((ranks < k).sum()) for k in (1, 3, 5)] == theirs
    assert 100 < theirs[0] < theirs[2] < 500


def test_parameters_are_counted_as_chinese_clip_counts(cn_clip: ModuleType) -> None:
    for spec in SMALL_SPECS.values():
        theirs = build_cn_clip(spec)
        size = ModelSize.of(spec)
        assert size.num_params == sum(one.numel() for one in theirs.parameters())
        assert size.num_visual_params == sum(one.numel() for one in theirs.visual.parameters())


def test_a_submission_is_what_the_script_writes(tmp_path: Path) -> None:
    """Keys in its order, one run of all pictures, six decimals; and each number as short as it can be."""
    rows = [np.array(row, np.float32) for row in ([0.25, 0.75], [1.0, 0.0], [2e-7, 0.9999998], [1e-6, 1 / 3])]
    path = tmp_path / "sub" / "mnist.json"
    assert write_submission(path, "Tuwen-ViT-B-16", "mnist", ModelSize(300, 100), iter(rows)) == 4
    assert json.loads(path.read_text()) == {
        "model_name": "Tuwen-ViT-B-16", "dataset_name": "mnist", "num_trainable_params": 0, "num_params": 300,
        "num_visual_params": 100, "num_backbone_params": 300, "n_shot": 0, "rnd_seeds": [0],
        "predictions": [[[round(value, 6) for value in row.tolist()] for row in rows]],
    }  # fmt: skip
    assert path.read_text().splitlines()[1:4] == ["[0.25,0.75],", "[1,0],", "[0,1],"]


def test_a_submission_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "mnist.json"
    path.write_text("old")

    def rows():  # type: ignore[no-untyped-def]
        yield np.zeros(2, np.float32)
        raise InvalidInput("stopped")

    with pytest.raises(InvalidInput, match="stopped"):
        write_submission(path, "model", "mnist", ModelSize(2, 1), rows())
    assert [one.name for one in tmp_path.iterdir()] == ["mnist.json"]
    assert path.read_text() == "old"


# --- figures ------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_embeddings(engine: TorchEngine, tmp_path: Path) -> None:
    """Counted by hand from the rows of the engine; more pictures than a block, so that blocks meet."""
    files = {
        f"{number}/{copy:02}-{shape}.png": draw_shape(colour, shape)
        for number, colour in enumerate(COLOURS)
        for copy in range(14 + number)
        for shape in SHAPES
    }
    folder = write_set(tmp_path, files, [*LABELS, "紫色"])
    result, _ = evaluate(engine, folder)
    data = read_class_folders(folder)
    classifier = build_classifier(engine, data.labels, TASK.templates)
    rows = np.stack(list(engine.embed_images((data.root / file).read_bytes() for file in data.files)))
    cosines = rows @ classifier.text_embeds.T
    right = cosines.argmax(axis=1) == data.truth
    assert len(data.files) == 4 * (14 + 15 + 16 + 17 + 18) > 256
    assert result.top1 == result.score == right.mean()
    assert result.mean_per_class == pytest.approx(np.mean([right[data.truth == one].mean() for one in range(5)]))
    own = cosines[np.arange(len(rows)), data.truth]
    assert result.top5 == ((cosines > own[:, None]).sum(axis=1) < 5).mean()
    matrix = result.confusion_matrix()
    assert matrix.shape == (6, 6)
    assert matrix.sum(axis=1).tolist() == [56, 60, 64, 68, 72, 0]
    assert np.trace(matrix) == right.sum()
    assert json.loads(json.dumps(result.to_dict()))["num_images"] == len(rows)


def test_top_5_of_five_labels_says_nothing(engine: TorchEngine, tmp_path: Path) -> None:
    assert evaluate(engine, write_set(tmp_path, colour_files()))[0].top5 is None


def test_an_unreadable_picture_costs_itself_alone(engine: TorchEngine, tmp_path: Path) -> None:
    """Left out of every figure, counted and named; in a submission it is undecided."""
    clean, _ = evaluate(engine, write_set(tmp_path / "clean", colour_files()))
    broken = {"0/aa.png": b"\x89PNG broken", "3/empty.jpg": b""}
    folder = write_set(tmp_path / "broken", colour_files() | broken)
    (folder / "test" / "4" / "gone.png").symlink_to("nowhere")
    result, scored = evaluate(engine, folder, keep_probs=True)
    assert (result.num_images, result.num_unreadable) == (20, 3)
    assert [line.split(":")[0] for line in result.unreadable] == ["0/aa.png", "3/empty.jpg", "4/gone.png"]
    assert result.confusion == clean.confusion
    assert (result.top1, result.mean_per_class) == (clean.top1, clean.mean_per_class)
    rows = list(submission_rows(read_class_folders(folder), scored))
    assert len(rows) == 23
    assert rows[0].tolist() == [pytest.approx(0.2)] * 5  # 0/aa.png
    assert all(row.sum() == pytest.approx(1) for row in rows)


def test_nothing_readable_is_said(engine: TorchEngine, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none of 1 pictures can be read; 0/a\.png: "):
        evaluate(engine, write_set(tmp_path, {"0/a.png": b"no picture"}))


def test_progress_ends_at_all(engine: TorchEngine, tmp_path: Path) -> None:
    data = read_class_folders(write_set(tmp_path, colour_files()))
    heard: list[tuple[int, int]] = []
    classifier = build_classifier(engine, data.labels, TASK.templates, lambda *done: heard.append(done))
    assert heard[-1] == (15, 15)
    evaluate_zero_shot(engine, data, TASK, classifier, on_progress=lambda *done: heard.append(done))
    assert heard[-1] == (20, 20)


# --- several labels a picture, two labels in all ------------------------------------------------------------


def test_a_name_in_several_folders_is_one_picture(engine: TorchEngine, tmp_path: Path) -> None:
    """VOC: a picture of a person on a horse lies in both folders; it is embedded once and has both labels."""
    two = draw_shape("红", "圆")
    files = {"0/1.png": two, "0/2.png": draw_shape("红", "方块"), "1/1.png": two, "1/3.png": draw_shape("绿", "圆")}
    folder = write_set(tmp_path, files, ["红色", "绿色", "没有"])
    (folder / "index.json").write_text("[0, 1, 3]")
    data = read_class_folders(folder)
    pictures = data.pictures(is_multi_label=True)
    assert pictures.files == ["0/1.png", "0/2.png", "1/3.png"]
    assert pictures.labels_of == [(0, 1), (0,), (1,)]
    assert pictures.picture_of_file.tolist() == [0, 1, 0, 2]
    task = Task("voc", "VOC", "map_11_points", ("{}",))
    result, scored = evaluate(engine, folder, task)
    assert result.num_images == 3
    assert scored.probs is not None
    sklearn = pytest.importorskip("sklearn.metrics")
    expected = []
    for label, relevant in enumerate(([1, 1, 0], [1, 0, 1])):
        precision, recall, _ = sklearn.precision_recall_curve(relevant, scored.probs[:, label])
        expected.append(np.mean([precision[recall >= threshold].max() for threshold in np.linspace(1, 0, 11)]))
    assert result.score == pytest.approx(np.mean(expected))
    rows = np.stack(list(submission_rows(data, scored)))
    np.testing.assert_array_equal(rows, scored.probs)  # the three, as index.json names them
    # Top 1: any of its labels will do, and the confusion counts it there.
    assert result.top1 == np.mean([int(p) in own for p, own in zip(scored.predicted, pictures.labels_of, strict=True)])


def test_roc_auc_is_between_two_labels(engine: TorchEngine, tmp_path: Path) -> None:
    files = {f"{number}/{shape}.png": draw_shape("红绿"[number], shape) for number in (0, 1) for shape in SHAPES}
    task = Task("memes", "Memes", "roc_auc", ("{}",))
    result, scored = evaluate(engine, write_set(tmp_path / "two", files, LABELS[:2]), task)
    assert scored.probs is not None
    second = scored.probs[:, 1]
    expected = np.mean((second[4:, None] > second[None, :4]) + 0.5 * (second[4:, None] == second[None, :4]))
    assert result.score == pytest.approx(expected)
    with pytest.raises(InvalidInput, match="memes: 5 labels; ROC AUC is between two"):
        evaluate(engine, write_set(tmp_path / "five", colour_files()), task)
    one = {name: encoded for name, encoded in files.items() if name.startswith("0")}
    with pytest.raises(InvalidInput, match="one class"):
        evaluate(engine, write_set(tmp_path / "one", one, LABELS[:2]), task)


# --- classifiers --------------------------------------------------------------------------------------------


def test_a_stored_classifier_answers_the_same(engine: TorchEngine, tmp_path: Path) -> None:
    """As a server loads it."""
    folder = write_set(tmp_path / "set", colour_files())
    data = read_class_folders(folder)
    built = build_classifier(engine, data.labels, TASK.templates)
    built.save(tmp_path / "colours.safetensors")
    stored = load_classifier(tmp_path / "colours.safetensors")
    assert (stored.labels, stored.templates) == (tuple(LABELS), TASK.templates)
    assert evaluate_zero_shot(engine, data, TASK, stored)[0] == evaluate(engine, folder)[0]
    np.testing.assert_allclose(np.linalg.norm(stored.text_embeds, axis=1), 1, atol=1e-6)


def test_another_models_or_sets_classifier_is_refused(engine: TorchEngine, tmp_path: Path) -> None:
    data = read_class_folders(write_set(tmp_path, colour_files()))
    others = TorchEngine(random_model(SMALL_SPECS["resnet"]))
    with pytest.raises(InvalidInput, match="the classifier was made with model"):
        evaluate_zero_shot(others, data, TASK, build_classifier(engine, data.labels, TASK.templates))
    with pytest.raises(InvalidInput, match="the classifier has 4 labels, the data 5"):
        evaluate_zero_shot(engine, data, TASK, build_classifier(engine, LABELS[:4], TASK.templates))


def test_equal_labels_are_embedded_once_and_the_first_wins(engine: TorchEngine) -> None:
    """ImageNet's Chinese labels have three that are there twice."""
    classifier = build_classifier(engine, ["红色", "绿色", "红色"], ("{}", "{}的"))
    assert classifier.labels == ("红色", "绿色", "红色")
    np.testing.assert_array_equal(classifier.text_embeds[0], classifier.text_embeds[2])
    assert not np.array_equal(classifier.text_embeds[0], classifier.text_embeds[1])


def test_pictures_are_prepared_as_everywhere(engine: TorchEngine) -> None:
    """The engine's preprocessing is the library's, which the published transform agrees with."""
    encoded = draw_shape("红", "圆")
    np.testing.assert_allclose(preprocess_image(encoded, 32), published_transform(encoded, 32).numpy(), atol=1e-6)


# --- tasks --------------------------------------------------------------------------------------------------


def test_every_task_has_prompts_of_one_label_each() -> None:
    tasks = load_tasks()
    assert len(tasks) >= 21
    for task in [*tasks.values(), general_task("folder")]:
        assert len(task.templates) >= 4, task.name
        assert all(template.count("{}") == 1 and template == template.strip() for template in task.templates)
    assert len(general_task("folder").templates) >= 10
    assert any("卫星" in one for one in tasks["eurosat_clip"].templates)
    assert any("手写" in one for one in tasks["mnist"].templates)


def test_metrics_are_elevaters() -> None:
    """arXiv 2204.08790, table of the 20 sets."""
    others = {name: task.metric for name, task in load_tasks().items() if task.metric != "accuracy"}
    assert others == {
        "caltech-101": "mean_per_class",
        "fgvc-aircraft-2013b-variants102": "mean_per_class",
        "oxford-flower-102": "mean_per_class",
        "oxford-iiit-pets": "mean_per_class",
        "hateful-memes": "roc_auc",
        "voc-2007-classification": "map_11_points",
        "emoji-groups": "mean_per_class",
    }


def test_a_task_is_found_by_either_spelling() -> None:
    assert find_task("eurosat-clip") is find_task("EuroSAT_clip") is load_tasks()["eurosat_clip"]
    assert find_task("fruit") is None
