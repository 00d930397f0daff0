"""Engines that compute here: order, bad items in their place, bounded memory; and how one is named and opened."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from eval.engine import Unusable
from eval.engines import open_engine, open_engine_at
from eval.onnx_engine import OnnxEngine
from eval.torch_engine import TorchEngine
from tests.conftest import SMALL_SPECS, random_model
from tests.serving.tiny_models import make_tower
from tests.shapes import shape_pairs
from tuwen.checkpoint import save_checkpoint
from tuwen.embed import embed_images, embed_texts
from tuwen.errors import InvalidInput
from tuwen.fingerprint import model_fingerprint
from tuwen.model import ChineseCLIP

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["猫", "一只猫在看窗外的雨", "SOON “箭头”", "狗" * 60, "红色的圆", "a", "黄色的三角形和蓝色的方块"] * 3


@pytest.fixture(scope="module")
def model() -> ChineseCLIP:
    return random_model(SMALL_SPECS["vit"])


@pytest.fixture
def engine(model: ChineseCLIP) -> Iterator[TorchEngine]:
    with TorchEngine(model, batch_size=4) as opened:
        yield opened


def test_rows_are_the_models_own_in_order(engine: TorchEngine, model: ChineseCLIP) -> None:
    """Texts of all lengths are sorted into batches and come back where they were; padding changes nothing."""
    files = list(shape_pairs().images.values())
    # Batches of another size add up in another order.
    assert np.allclose(np.stack(list(engine.embed_images(files))), embed_images(model, iter(files)), atol=1e-5)
    assert np.allclose(np.stack(list(engine.embed_texts(TEXTS))), embed_texts(model, TEXTS), atol=1e-5)


def test_what_an_engine_says_of_itself(engine: TorchEngine, model: ChineseCLIP) -> None:
    assert (engine.kind, engine.model_name, engine.embed_dim) == ("torch", "Small-ViT", 32)
    assert engine.fingerprint == model_fingerprint(model.spec, model.state_dict())


def test_texts_are_normalised_as_in_training(engine: TorchEngine) -> None:
    """Upper case and curly quotes; without it “ is [UNK]."""
    written, normal = engine.embed_texts(["SOON “箭头”", 'soon "箭头"'])
    assert np.array_equal(written, normal)


def test_a_bad_item_stands_in_its_place(engine: TorchEngine) -> None:
    """With the sentence the server would say; its batch-mates are embedded as without it."""
    good = list(shape_pairs().images.values())[:9]
    files = [*good[:3], b"no picture", *good[3:6], b"", *good[6:]]
    rows = list(engine.embed_images(files))
    bad = {index: str(row) for index, row in enumerate(rows) if isinstance(row, Unusable)}
    assert bad.keys() == {3, 7}
    assert bad[3].startswith("image is not a readable picture file")
    assert bad[7] == "image is empty, expected an encoded picture file"
    kept = [row for row in rows if not isinstance(row, Unusable)]
    assert np.allclose(np.stack(kept), np.stack(list(engine.embed_images(good))), atol=1e-5)

    rows = list(engine.embed_texts(["猫", " \n", "狗", "图" * 4097, "\ud83d"]))
    assert [isinstance(row, Unusable) for row in rows] == [False, True, False, True, True]
    assert str(rows[1]) == "text is empty, expected at least one character"
    assert str(rows[3]) == "text has 4097 characters, the limit is 4096"
    assert str(rows[4]).startswith("text is not valid UTF-8")


def test_an_endless_input_is_taken_as_it_is_needed(engine: TorchEngine) -> None:
    """Two windows ahead at most: memory does not grow with the input."""
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        for file in itertools.cycle(shape_pairs().images.values()):
            taken += 1
            yield file

    assert len(list(itertools.islice(engine.embed_images(endless()), 30))) == 30
    assert taken <= 30 + 3 * 4


def test_nothing_gives_nothing(engine: TorchEngine) -> None:
    assert list(engine.embed_images([])) == []
    assert list(engine.embed_texts(iter(()))) == []


def test_a_batch_of_none_is_refused(model: ChineseCLIP) -> None:
    with pytest.raises(InvalidInput, match="batch size 0: expected at least 1"):
        TorchEngine(model, batch_size=0)


# --- by name --------------------------------------------------------------------------------------------------------


def place_tower(repository: Path, side: str, version: int, fingerprint: int, architecture: str = "Small") -> None:
    folder = repository / f"shop_{side}_tower" / str(version)
    folder.mkdir(parents=True)
    onnx.save(make_tower(), folder / "model.onnx")
    (folder / "build.json").write_text(json.dumps({"architecture": architecture, "fingerprint": fingerprint}))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One built model, versions 9 and 10."""
    for version, side in itertools.product((9, 10), ("text", "image")):
        place_tower(tmp_path, side, version, fingerprint=100 + version)
    (tmp_path / "other_text_tower" / "1").mkdir(parents=True)  # committed, not built
    return tmp_path


def test_the_newest_version_of_the_only_model_is_opened(repository: Path) -> None:
    """10 is newer than 9, which its name is not."""
    with OnnxEngine(repository) as engine:
        assert (engine.kind, engine.model_name, engine.fingerprint, engine.embed_dim) == ("onnx", "Small", 110, 3)
    with open_engine_at(f"onnx:{repository}/shop@9") as engine:
        assert engine.fingerprint == 109
    with open_engine_at(f"onnx:{repository}/shop") as engine:
        assert engine.fingerprint == 110
    with open_engine_at(f"onnx:{repository}") as engine:
        assert engine.fingerprint == 110


def test_two_towers_of_two_models_are_refused(repository: Path) -> None:
    """A build that was placed half, or by hand."""
    place_tower(repository, "text", 11, fingerprint=1)
    with pytest.raises(InvalidInput, match="not two towers of one model; build both again"):
        OnnxEngine(repository)
    place_tower(repository, "image", 11, fingerprint=2)
    with pytest.raises(InvalidInput, match=r"has fingerprint 1, .* 2: they are not two towers of one model"):
        OnnxEngine(repository)


def test_what_is_not_built_is_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"other_text_tower: no model\.onnx in a version folder; `tuwen build"):
        OnnxEngine(repository, "other")
    with pytest.raises(InvalidInput, match=r"shop_text_tower/7/build\.json: cannot be read: No such file"):
        OnnxEngine(repository, "shop", 7)
    with pytest.raises(InvalidInput, match="nowhere: no built model in it"):
        OnnxEngine(tmp_path / "nowhere")
    (repository / "shop_text_tower" / "10" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InvalidInput, match=r"10/model\.onnx: ONNX Runtime cannot load it"):
        OnnxEngine(repository)
    (repository / "shop_text_tower" / "10" / "build.json").write_text("[]")
    with pytest.raises(InvalidInput, match=r"build\.json: not what `tuwen build` writes"):
        OnnxEngine(repository)


def test_several_built_models_want_a_name(repository: Path) -> None:
    (repository / "shop_text_tower").rename(repository / "shoes_text_tower")
    place_tower(repository, "text", 1, fingerprint=1)
    with pytest.raises(InvalidInput, match="holds shoes, shop; name one with --model"):
        OnnxEngine(repository)


def test_a_checkpoint_is_opened_by_name(tmp_path: Path, model: ChineseCLIP) -> None:
    save_checkpoint(model, tmp_path / "model")
    with open_engine_at(f"torch:{tmp_path}/model") as engine:
        assert (engine.kind, engine.model_name) == ("torch", "Small-ViT")
    with pytest.raises(InvalidInput, match="needs a checkpoint: --checkpoint DIR"):
        open_engine("torch")


@pytest.mark.parametrize("place", ["", "torch", "torch:", "samples/emoji_tiny", "tensorflow:x", "triton:", "onnx:"])
def test_a_word_that_names_no_engine_is_refused(place: str) -> None:
    with pytest.raises(InvalidInput, match="expected torch:CHECKPOINT, onnx:REPOSITORY"):
        open_engine_at(place)


def test_a_name_that_no_model_can_have_is_refused() -> None:
    with pytest.raises(InvalidInput, match="expected onnx:REPOSITORY"):
        open_engine_at("onnx:nowhere/Shop@x")
