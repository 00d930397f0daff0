"""A checkpoint in PyTorch, its files in ONNX Runtime and the live server: the same rows, the same figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from tuwen_client import ServerUnavailable

from eval.compare import check_agreement, compare
from eval.engine import Engine, Unusable
from eval.engines import open_engine, open_engine_at
from eval.retrieval import evaluate_retrieval
from tests.shapes import MemoryPairs, write_pairs
from tests.system.conftest import SAMPLE_CHECKPOINT, some_ports
from tuwen.checkpoint import load_checkpoint, save_checkpoint
from tuwen.data.pairs import PairSet, TextRecord
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton

NUM_IMAGES = 320


@pytest.fixture(scope="module")
def engines(sample_repository: Path, sample_server: EmbeddedServer) -> Iterator[list[Engine]]:
    """torch, onnx, triton."""
    with ExitStack() as stack:
        opened = (
            open_engine("torch", checkpoint=SAMPLE_CHECKPOINT),
            open_engine("onnx", repository=sample_repository),
            open_engine("triton", url=sample_server.endpoints.grpc),
        )
        yield [stack.enter_context(one) for one in opened]


@pytest.fixture(scope="module")
def some_pairs(sample_pairs: PairSet) -> MemoryPairs:
    """Every sixth picture of Emoji-CN's held-out style with its texts, some of which describe several."""
    image_ids = list(sample_pairs.image_ids)[::6][:NUM_IMAGES]
    kept = set(image_ids)
    texts = [
        TextRecord(record.text_id, record.text, tuple(one for one in record.image_ids if one in kept))
        for record in sample_pairs.texts
    ]
    return MemoryPairs(
        {one: sample_pairs.image_bytes(one) for one in image_ids}, [record for record in texts if record.image_ids]
    )


def test_the_three_engines_are_one_model(engines: list[Engine]) -> None:
    """By the fingerprint; the served name is the architecture's, written as Triton wants it."""
    assert [engine.kind for engine in engines] == ["torch", "onnx", "triton"]
    assert [engine.model_name for engine in engines] == ["Tiny-RN", "Tiny-RN", "tiny_rn"]
    assert len({(engine.fingerprint, engine.embed_dim) for engine in engines}) == 1


def test_recall_of_the_three_engines_is_identical(engines: list[Engine], some_pairs: MemoryPairs) -> None:
    """A difference of 0 in every figure and every rank, and nearly the same rows."""
    evaluated = [evaluate_retrieval(engine, some_pairs, "emoji", "valid") for engine in engines]
    first = evaluated[0]
    assert 0.2 < first[0].text_to_image.r1 < 0.9  # figures that could differ
    for other in evaluated[1:]:
        assert other[0].text_to_image == first[0].text_to_image
        assert other[0].image_to_text == first[0].image_to_text
        found = compare(first, other)
        # float32 towers differ by the order of their sums alone.
        check_agreement(found, min_cosine=0.999999, max_recall_difference=0)
        assert (found.text_to_image.same_rank, found.image_to_text.same_rank) == (1, 1)
        assert found.text_to_image.same_top_1 == 1


def test_odd_texts_are_read_alike(engines: list[Engine]) -> None:
    """Upper case, curly quotes, lengths to the limit and beyond, white space: what is served is what was trained."""
    texts = ["SOON “箭头”", "Ｔ恤", "İstanbul", "猫　狗", "图" * 4096, "👨‍👩‍👧", "a" * 300, "\u200b猫", "é", "﹁引﹂"]
    texts += ["字" * size for size in range(1, 60, 7)]
    rows = [np.stack(list(engine.embed_texts(texts))) for engine in engines]  # type: ignore[arg-type]
    for other in rows[1:]:
        assert np.einsum("nd,nd->n", rows[0], other).min() > 0.999999
    assert np.allclose(rows[0][0], next(iter(engines[0].embed_texts(['soon "箭头"']))), atol=1e-6)


def test_bad_items_stand_in_their_places_with_one_sentence(engines: list[Engine], some_pairs: MemoryPairs) -> None:
    """Whoever finds the fault, and whatever is around it."""
    good = list(some_pairs.images.values())[:100]
    files = [*good[:70], b"GIF89a, cut off", *good[70:], b"", b"no picture"]
    texts = ["猫", " ", "狗", "图" * 4097, "\ud83d", "旗"]
    for items, call, bad in ((files, "embed_images", {70, 101, 102}), (texts, "embed_texts", {1, 3, 4})):
        rows = [list(getattr(engine, call)(items)) for engine in engines]
        reasons = [{index: str(row) for index, row in enumerate(each) if isinstance(row, Unusable)} for each in rows]
        assert reasons[0].keys() == bad
        assert reasons[1] == reasons[0]
        # The client finds an empty picture itself, before anything is sent.
        assert reasons[2] == reasons[0]
        for index in set(range(len(items))) - bad:
            assert np.allclose(rows[0][index], rows[1][index], atol=1e-5)
            assert np.allclose(rows[0][index], rows[2][index], atol=1e-5)


def test_a_server_that_is_not_there_is_the_clients_error() -> None:
    """Not an unusable item: the rest would fail as well."""
    with open_engine_at(f"triton:localhost:{some_ports().grpc}/tiny_rn") as engine, pytest.raises(ServerUnavailable):
        list(engine.embed_texts(["猫"]))


# --- the commands ---------------------------------------------------------------------------------------------------


def tuwen(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tuwen.cli", *arguments], capture_output=True, text=True, timeout=180, check=False
    )


@pytest.fixture(scope="module")
def few_pairs(some_pairs: MemoryPairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures as files."""
    folder = tmp_path_factory.mktemp("few")
    images = dict(list(some_pairs.images.items())[:40])
    write_pairs(
        folder, "valid", MemoryPairs(images, [one for one in some_pairs.texts if set(one.image_ids) <= images.keys()])
    )
    return folder


def test_retrieval_through_a_server_is_retrieval_of_its_files(
    few_pairs: Path, sample_repository: Path, sample_server: EmbeddedServer, tmp_path: Path
) -> None:
    """`tuwen eval retrieval` with each engine; the report is written beside."""
    report = tmp_path / "report.html"
    served = tuwen("eval", "retrieval", "--data", str(few_pairs), "--engine", "triton", "--url",
                   sample_server.endpoints.grpc, "--report", str(report), "--json")  # fmt: skip
    built = tuwen("eval", "retrieval", "--data", str(few_pairs), "--engine", "onnx", "--repository",
                  str(sample_repository), "--model", "tiny_rn", "--version", "1", "--json")  # fmt: skip
    assert (served.returncode, built.returncode) == (0, 0), served.stderr + built.stderr
    one, other = json.loads(served.stdout), json.loads(built.stdout)
    assert (one["engine"], one["architecture"]) == ("triton", "tiny_rn")
    assert (other["engine"], other["architecture"]) == ("onnx", "Tiny-RN")
    for key in ("fingerprint", "num_images", "text_to_image", "image_to_text"):
        assert one[key] == other[key]
    assert "Retrieval: tiny_rn" in report.read_text(encoding="utf-8")


def test_a_deployment_that_serves_the_checkpoint_is_accepted(few_pairs: Path, sample_server: EmbeddedServer) -> None:
    """`tuwen eval compare`, the acceptance test: exit 0, with nothing on stderr."""
    place = f"triton:{sample_server.endpoints.grpc}/tiny_rn"
    ended = tuwen("eval", "compare", f"torch:{SAMPLE_CHECKPOINT}", place, "--data", str(few_pairs), "--json",
                  "--min-cosine", "0.999999", "--max-recall-difference", "0")  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    found = json.loads(ended.stdout)
    assert found["is_same_model"] is True
    assert found["min_cosine"] > 0.999999
    assert found["text_to_image"]["differences"]["mean_rank"] == 0


def test_a_deployment_of_other_weights_is_not(few_pairs: Path, sample_server: EmbeddedServer, tmp_path: Path) -> None:
    """Exit 1 with the figures, a warning about the fingerprints, and one sentence."""
    model = load_checkpoint(SAMPLE_CHECKPOINT)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        model.text_projection += 0.05 * torch.randn(model.text_projection.shape, generator=generator)
    save_checkpoint(model, tmp_path / "other")
    place = f"triton:{sample_server.endpoints.grpc}"
    ended = tuwen("eval", "compare", f"torch:{tmp_path}/other", place, "--data", str(few_pairs))
    assert ended.returncode == 1
    rows = {row.split("│")[1].strip(): row for row in ended.stdout.splitlines() if row.startswith("│")}
    assert rows["pictures"].count("1.000000") == 5  # the text side alone was changed
    assert "1.000000" not in rows["texts"]
    assert rows["text to image, same ten best"].count("%") == 1
    warning, error = ended.stderr.strip().splitlines()
    assert warning.startswith("warning: fingerprints differ")
    assert error.startswith("error: the two engines differ: the worst cosine is 0.")
