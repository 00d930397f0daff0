"""The fuzzer: the models withstand a short run of it, and it sees what it is there to see."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import FunctionType

import pytest
from PIL import Image

from perf.fuzz.inputs import FuzzInput, make_input
from perf.fuzz.judgement import BadAnswer, judge_memory, refusal_class
from perf.fuzz.models import MODELS, Models
from perf.fuzz.pictures import seed_pictures
from perf.fuzz.workers import Pool

BAD_INDEX = 7
SEED = 0


class Faulty(Models):
    """What happens at one input; the others are fine."""

    def __init__(self, fault: Callable[[], object]) -> None:
        self._fault = fault

    def run(self, item: FuzzInput) -> str:
        if item == make_input(SEED, BAD_INDEX):
            self._fault()
        return "ok"


def segfaulting() -> Models:
    return Faulty(lambda: os.kill(os.getpid(), signal.SIGSEGV))


def hanging() -> Models:
    return Faulty(lambda: time.sleep(60))


def exiting() -> Models:
    return Faulty(lambda: sys.exit(3))


def busy() -> Models:
    def work() -> None:
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass

    return Faulty(work)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    """In this process, whose other tests must find neither the stand-in nor the model's setting of Pillow."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", sys)
    for name in ("queued_model", "responses", "picture_model"):  # other tests may have given them another stand-in
        monkeypatch.delitem(sys.modules, f"tuwen.serving.{name}", raising=False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    return Models()


def test_2000_inputs_are_answered_or_refused_with_a_sentence() -> None:
    findings = Pool(SEED, time_limit_s=20).run(range(2000), workers=2)
    assert not findings.failures
    assert findings.outcomes.total() == 2000
    assert findings.outcomes["image: ok"] > 200
    assert findings.outcomes["text: ok"] > 200
    assert findings.outcomes["image: cannot be decoded"] > 200
    assert {len(samples) for samples in findings.rss_mib.values()} == {10}


def test_an_input_is_the_same_whenever_it_is_made_and_no_two_are() -> None:
    assert [make_input(SEED, index) for index in range(500)] == [make_input(SEED, index) for index in range(500)]
    assert make_input(SEED, 1) != make_input(SEED + 1, 1)


def test_inputs_cover_every_format_and_every_plane() -> None:
    items = [make_input(SEED, index) for index in range(4000)]
    assert {item.format for item in items} == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "text"}
    planes = {ord(char) >> 16 for item in items if item.kind == "text" for char in item.data.decode(errors="ignore")}
    assert planes == set(range(17))
    damaged = Counter(item.format for item in items if not item.intact)
    assert min(damaged.values()) > 50


def test_every_seed_picture_is_valid_before_it_is_damaged(models: Models) -> None:
    for format, encoded in seed_pictures():
        assert models.run(FuzzInput("image", format, encoded, True)) == "ok"


def test_a_refused_valid_picture_is_a_failure(models: Models) -> None:
    with pytest.raises(BadAnswer, match="a valid PNG was refused: image is not a readable"):
        models.run(FuzzInput("image", "PNG", b"no picture", True))


def test_a_model_that_raises_is_a_failure(models: Models) -> None:
    models._models["image"].resolution = -1
    for is_intact, sentence in ((True, "a valid PNG was refused: the server made a mistake"), (False, "code INTERNAL")):
        with pytest.raises(BadAnswer, match=sentence):
            models.run(FuzzInput("image", "PNG", seed_pictures()[0][1], is_intact))


def test_both_models_are_the_committed_ones(models: Models) -> None:
    for kind, name in MODELS.items():
        own = [each for each in vars(type(models._models[kind])).values() if isinstance(each, FunctionType)]
        assert own
        assert all(each.__code__.co_filename.endswith(f"model_repository/{name}/1/model.py") for each in own)


@pytest.mark.parametrize(
    ("load", "what"),
    [
        (segfaulting, "the process died of signal SIGSEGV"),
        (exiting, "the process died of exit status 3"),
        (hanging, "no answer after 0.8 s, killed"),
        (busy, "took 0."),
    ],
)
def test_a_fault_is_named_with_its_input_and_the_run_goes_on(load: Callable[[], Models], what: str) -> None:
    findings = Pool(SEED, time_limit_s=0.2, load=load).run(range(20), workers=2)
    assert findings.outcomes == {"image: ok": 14, "text: ok": 5, "FAILED": 1}
    assert len(findings.failures) == 1
    assert f"--seed 0 --start {BAD_INDEX} --inputs 1: {what}" in findings.failures[0]


@pytest.mark.parametrize(
    "sentence",
    [
        "image cannot be decoded: cannot identify <_io.BytesIO object at 0x7f0012345678>",
        "image cannot be decoded: /srv/tuwen/model.py",
        "image cannot be decoded: Traceback (most recent call last)",
        "image cannot be decoded: line one\nline two",
        "image cannot be decoded: ",
        "text is empty " + "x" * 500,
        "something else",
    ],
)
def test_a_sentence_that_shows_the_inside_or_nothing_is_a_failure(sentence: str) -> None:
    with pytest.raises(BadAnswer):
        refusal_class(sentence)


def test_growing_memory_is_seen_and_filling_caches_are_forgiven() -> None:
    leak = judge_memory("leaks", [100 + 0.1 * index for index in range(1000)])
    assert leak is not None
    assert not leak.is_flat
    warming = judge_memory("warms up", [100 + min(index, 150) + index % 5 for index in range(1000)])
    assert warming is not None
    assert warming.is_flat
    assert judge_memory("short", [1.0] * 5) is None
