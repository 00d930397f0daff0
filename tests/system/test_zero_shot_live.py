"""Zero-shot evaluation through a checkpoint, its ONNX files and the live server; and the stored classifier, served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tuwen_client import Client

from eval.class_folders import ClassFolders, read_class_folders
from eval.engine import Engine
from eval.engines import open_engine
from eval.prompts import load_tasks
from eval.sample_sets import GROUP_LABELS, LabelledPicture, write_class_folders
from eval.zero_shot import LOGIT_SCALE, build_classifier, evaluate_zero_shot
from tests.system.conftest import SAMPLE_CHECKPOINT, SAMPLE_DATA
from tuwen.data.emoji_cn import read_groups
from tuwen.data.pairs import open_pairs
from tuwen.model import ChineseCLIP
from tuwen.scoring import softmax
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton
TASK = load_tasks()["emoji-groups"]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> ClassFolders:
    """Every twelfth emoji, of nine groups."""
    folder = tmp_path_factory.mktemp("sets") / "emoji-groups"
    pairs = open_pairs(SAMPLE_DATA, "valid")
    keys = [key for key in GROUP_LABELS if key != "component"]
    chosen = list(read_groups(SAMPLE_DATA, pairs.image_ids).items())[::12]
    pictures = (LabelledPicture(keys.index(key), f"{one}.webp", pairs.image_bytes(one)) for one, key in chosen)
    write_class_folders(folder, {key: GROUP_LABELS[key] for key in keys}, pictures)
    (folder / "test" / "3" / "broken.png").write_bytes(b"no picture")
    return read_class_folders(folder)


@pytest.fixture
def engines(sample_server: EmbeddedServer, sample_repository: Path) -> Iterator[list[Engine]]:
    with (
        open_engine("torch", checkpoint=SAMPLE_CHECKPOINT) as torch_engine,
        open_engine("onnx", repository=sample_repository, model="tiny_rn") as onnx_engine,
        open_engine("triton", url=sample_server.endpoints.grpc) as triton_engine,
    ):
        yield [torch_engine, onnx_engine, triton_engine]


def test_three_engines_one_answer(engines: list[Engine], groups: ClassFolders) -> None:
    """The same picture is unreadable to all three, and the same label closest."""
    first, *others = [
        evaluate_zero_shot(engine, groups, TASK, build_classifier(engine, groups.labels, TASK.templates))
        for engine in engines
    ]
    assert first[0].num_unreadable == 1
    assert first[0].mean_per_class > 2 / len(groups.labels)  # twice chance: these are answers, not noise
    for result, scored in others:
        np.testing.assert_array_equal(scored.predicted, first[1].predicted)
        assert (result.score, result.top5, result.confusion) == (first[0].score, first[0].top5, first[0].confusion)
        assert scored.unreadable.keys() == first[1].unreadable.keys()


def test_a_stored_classifier_is_served(
    engines: list[Engine], groups: ClassFolders, sample_repository: Path, client: Client, sample_model: ChineseCLIP
) -> None:
    """Made with the checkpoint, read by the server: it calls a picture what the evaluation called it."""
    classifier = build_classifier(engines[0], groups.labels, TASK.templates)
    path = sample_repository / "tiny_rn_zero_shot" / "classifiers" / "emoji_groups.safetensors"
    classifier.save(path)
    try:
        _, scored = evaluate_zero_shot(engines[0], groups, TASK, classifier, keep_probs=True)
        read = np.flatnonzero(scored.is_read)[:20]
        pictures = [(groups.root / scored.pictures.files[one]).read_bytes() for one in read]
        answers = client.classify(pictures, classifier="emoji_groups")
    finally:
        path.unlink()
    assert answers.best == [groups.labels[one] for one in scored.predicted[read]]
    # Probabilities are of the published scale of 100 here, of the model's own there: the cosines are the same.
    own_scale = float(sample_model.logit_scale.detach().exp())
    probs = softmax(answers.logits_per_image * (LOGIT_SCALE / own_scale))
    assert scored.probs is not None
    np.testing.assert_allclose(probs, scored.probs[read], atol=1e-3)
