"""What suits the machine is measured, and written where Triton reads it and a person can change it."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from builders.build import build
from builders.tune import Candidate, Measured, candidates, choose, tune
from tests.conftest import SMALL_SPECS, random_model
from tuwen.checkpoint import save_checkpoint


def read(path: Path) -> pb.ModelConfig:
    return text_format.Parse(path.read_text(encoding="utf-8"), pb.ModelConfig())


def test_candidates_use_every_core_and_few_copies_of_the_weights() -> None:
    assert candidates(1) == [Candidate(1, 1), Candidate(2, 1)]
    assert candidates(2) == [Candidate(1, 2), Candidate(1, 2, 2), Candidate(2, 2), Candidate(2, 1)]
    assert candidates(16) == [
        Candidate(1, 16), Candidate(1, 16, 2), Candidate(1, 16, 4), Candidate(2, 16), Candidate(2, 8), Candidate(4, 4),
    ]  # fmt: skip
    assert candidates(3) == [Candidate(1, 3), Candidate(1, 3, 2), Candidate(2, 3), Candidate(3, 1)]
    assert [each.copies for each in candidates(16)] == [1, 2, 2, 2, 2, 4]


def test_throughput_decides_unless_a_lone_request_suffers() -> None:
    one, two = Measured(Candidate(1, 2), 100, 10.0), Measured(Candidate(2, 1), 120, 20.0)
    assert choose([one, two]) == one
    assert choose([one, Measured(Candidate(2, 1), 120, 12.0)]).candidate == Candidate(2, 1)
    assert choose([one, Measured(Candidate(2, 1), 102, 12.0)]) == one, "not worth a second copy of the weights"
    assert choose([one, Measured(Candidate(1, 2, 2), 102, 10.0)]) == one, "nor this one"
    assert choose([one, Measured(Candidate(1, 2, 2), 120, 10.0), two]).candidate == Candidate(1, 2, 2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    save_checkpoint(random_model(SMALL_SPECS["vit"]), folder / "checkpoint")
    build(folder / "checkpoint", "small", folder / "repository")
    return folder / "repository"


@pytest.mark.triton
def test_a_tuned_config_differs_only_in_what_was_measured(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builders.tune.PASSES", 1)
    monkeypatch.setattr("builders.tune._ROUND_S", 0.3)
    by_hand = built / "small_text_tower" / "config.pbtxt"
    by_hand.write_text(by_hand.read_text().replace('"128"', '"99"'))
    written = tune(built, "small", 32, num_cores=2)
    assert [path.parent.parent.name for path in written] == [
        "small_text_tower", "small_image_tower", "preprocess_image_32",
    ]  # fmt: skip
    for path in written:
        tuned, original = read(path), read(path.parent.parent / "config.pbtxt")
        assert 1 <= tuned.instance_group[0].count <= 2
        if "tower" in path.parent.parent.name:
            assert int(tuned.parameters["intra_op_thread_count"].string_value) in (1, 2)
            assert path.read_text().count("alone") == 4, "the header has every candidate's measurement"
            assert tuned.parameters["batches_at_once"].string_value in ("1", "2")
            for name in ("intra_op_thread_count", "batches_at_once"):
                del tuned.parameters[name]
                original.parameters.pop(name, None)
        else:
            assert int(tuned.parameters["decoders"].string_value) >= 1
            tuned.parameters["decoders"].string_value = "0"
        tuned.instance_group[0].count = original.instance_group[0].count
        assert tuned == original
    assert 'string_value: "99"' in written[0].read_text()
    assert not list(built.glob(".tune-*"))
