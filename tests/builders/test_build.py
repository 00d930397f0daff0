"""Building: what is placed computes what PyTorch computes, and whatever fails places nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from builders import onnx_export
from builders.build import BuildResult, build
from builders.parity import measure_parity
from builders.repository import drifted, rendered_files
from builders.towers import TOWERS, ExportFailed, TowerKind
from tests.conftest import SMALL_SPECS, random_model
from tuwen.checkpoint import load_checkpoint, save_checkpoint
from tuwen.errors import InvalidInput
from tuwen.fingerprint import model_fingerprint
from tuwen.model import ChineseCLIP
from tuwen.specs import CLS_ID, SEP_ID, ModelSpec
from tuwen.tokenizer import pack_rows, pad_rows

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
# Both run float32; over small towers their sums differ by some 1e-7.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Built:
    """A checkpoint, the model in it, and what building it left."""

    checkpoint: Path
    model: ChineseCLIP
    result: BuildResult

    def onnx_path(self, kind: TowerKind) -> Path:
        return self.result.repository / f"{self.result.name}_{kind}_tower" / "1" / "model.onnx"


def build_small(spec: ModelSpec, folder: Path) -> Built:
    save_checkpoint(random_model(spec), folder / "model")
    return Built(folder / "model", load_checkpoint(folder / "model"), build(folder / "model", None, folder / "served"))


@pytest.fixture(scope="module")
def built_vit(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_small(SMALL_SPECS["vit"], tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def built_resnet(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_small(SMALL_SPECS["resnet"], tmp_path_factory.mktemp("resnet"))


@pytest.fixture(params=["vit", "resnet"])
def built(request: pytest.FixtureRequest) -> Built:
    return request.getfixturevalue(f"built_{request.param}")


def run_tower(path: Path, kind: TowerKind, feed: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(embeds, fingerprint) by the names the configs have."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [tensor.name for tensor in session.get_inputs()] == list(feed)
    embeds, fingerprint = session.run([f"{kind}_embeds", "fingerprint"], feed)
    return embeds, fingerprint


def some_pixels(spec: ModelSpec, batch: int) -> dict[str, np.ndarray]:
    shape = (batch, 3, spec.vision.resolution, spec.vision.resolution)
    return {"pixel_values": np.random.default_rng(batch).standard_normal(shape, np.float32)}


def some_texts(spec: ModelSpec, *lengths: int) -> list[list[int]]:
    random = np.random.default_rng(sum(lengths))
    return [[CLS_ID, *random.integers(SEP_ID + 1, spec.text.vocab_size, length - 2), SEP_ID] for length in lengths]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; empty folders too."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


# --- what is placed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5])
def test_the_image_tower_equals_pytorch(built: Built, batch: int) -> None:
    """Any batch, rows of unit length, the same as PyTorch's."""
    feed = some_pixels(built.model.spec, batch)
    embeds, _ = run_tower(built.onnx_path("image"), "image", feed)
    with torch.inference_mode():
        expected = built.model.encode_image(torch.from_numpy(feed["pixel_values"]), normalize=True).numpy()
    assert embeds.shape == (batch, 32)
    assert np.abs(embeds - expected).max() <= TOLERANCE
    assert np.abs(np.linalg.norm(embeds, axis=1) - 1).max() <= TOLERANCE


@pytest.mark.parametrize("lengths", [(3,), (52,), (8, 8, 8), (64, 3, 17, 9, 40)])
def test_the_text_tower_equals_pytorch(built: Built, lengths: tuple[int, ...]) -> None:
    """Any batch of any lengths up to the positions, packed, is what PyTorch makes of the same texts padded."""
    rows = some_texts(built.model.spec, *lengths)
    embeds, _ = run_tower(built.onnx_path("text"), "text", pack_rows(rows))
    with torch.inference_mode():
        expected = built.model.encode_text(torch.from_numpy(pad_rows(rows, max(lengths))), normalize=True).numpy()
    assert embeds.shape == (len(lengths), 32)
    assert np.abs(embeds - expected).max() <= TOLERANCE
    assert np.abs(np.linalg.norm(embeds, axis=1) - 1).max() <= TOLERANCE


def test_a_text_does_not_see_its_neighbours(built: Built) -> None:
    """Alone or among longer and shorter ones, it has the same vector."""
    rows = some_texts(built.model.spec, 7, 30, 3)
    together, _ = run_tower(built.onnx_path("text"), "text", pack_rows(rows))
    for row, embeds in zip(rows, together, strict=True):
        alone, _ = run_tower(built.onnx_path("text"), "text", pack_rows([row]))
        assert np.abs(alone[0] - embeds).max() <= TOLERANCE


def test_the_text_tower_tells_its_logit_scale(built: Built) -> None:
    """The learned log, a row for every text."""
    session = ort.InferenceSession(built.onnx_path("text"), providers=["CPUExecutionProvider"])
    (scale,) = session.run(["logit_scale"], pack_rows(some_texts(built.model.spec, 5, 4)))
    assert scale.tolist() == [[built.model.logit_scale.item()]] * 2


@pytest.mark.parametrize("kind", TOWERS)
def test_every_row_carries_the_fingerprint(built: Built, kind: TowerKind) -> None:
    """Of the weights in the checkpoint, the same in both towers, in build.json and in the result."""
    expected = model_fingerprint(built.model.spec, built.model.state_dict())
    spec = built.model.spec
    feed = some_pixels(spec, 3) if kind == "image" else pack_rows(some_texts(spec, 5, 4, 9))
    _, fingerprint = run_tower(built.onnx_path(kind), kind, feed)
    assert fingerprint.dtype == np.int64
    assert fingerprint.tolist() == [[expected]] * 3
    record = json.loads(built.onnx_path(kind).with_name("build.json").read_text(encoding="utf-8"))
    assert record["fingerprint"] == built.result.fingerprint == expected


@pytest.mark.parametrize("kind", TOWERS)
def test_build_json_says_what_was_built_from_what(built: Built, kind: TowerKind) -> None:
    """The weights' hash, the measured parity, opset and tools."""
    record = json.loads(built.onnx_path(kind).with_name("build.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256((built.checkpoint / "model.safetensors").read_bytes()).hexdigest()
    assert record["checkpoint"] == {"name": "model", "sha256": digest}
    assert (record["architecture"], record["tower"]) == (built.model.spec.name, kind)
    assert (record["precision"], record["opset"]) == ("fp32", 18)
    assert record["tools"]["torch"] == version("torch")
    assert record["parity_with_pytorch"] == vars(built.result.parity[kind])
    assert record["parity_with_pytorch"]["num_items"] >= 16
    assert record["parity_with_pytorch"]["max_abs_diff"] <= TOLERANCE


def test_the_repository_is_complete(built: Built) -> None:
    """Configs as rendered, an artifact in each tower's 1, a 1 for each ensemble, the tokenizer's code, and no more."""
    name, repository = built.model.spec.slug, built.result.repository
    assert drifted(rendered_files(built.model.spec, name), repository) == []
    placed = {str(Path(f"{name}_{kind}_tower", "1", file)) for kind in TOWERS for file in ("model.onnx", "build.json")}
    code = {"tokenize_text/1/model.py", f"preprocess_image_{built.model.spec.vision.resolution}/1/model.py"}
    rendered = {str(path) for path in rendered_files(built.model.spec, name)}
    found = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert found == rendered | placed | code


@pytest.mark.parametrize("kind", TOWERS)
def test_the_artifact_has_the_contracts_tensors(built: Built, kind: TowerKind) -> None:
    """Names in order, dynamic batch and length, a fixed width; the opset; and no path of this machine."""
    proto = onnx.load(built.onnx_path(kind))
    dims = {
        value.name: [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    side = built.model.spec.vision.resolution
    own = {
        "text": {"input_ids": [-1], "text_offsets": [-1], "longest_text": [-1], "logit_scale": [-1, 1]},
        "image": {"pixel_values": [-1, 3, side, side]},
    }
    assert dims == own[kind] | {f"{kind}_embeds": [-1, 32], "fingerprint": [-1, 1]}
    assert [one.version for one in proto.opset_import if one.domain in ("", "ai.onnx")] == [18]
    assert str(ROOT).encode() not in built.onnx_path(kind).read_bytes()
    assert b"site-packages" not in built.onnx_path(kind).read_bytes()


# --- a second build -----------------------------------------------------------------------------------------------


@pytest.fixture
def repository(built_vit: Built, tmp_path: Path) -> Path:
    """A copy of what `built_vit` left: a previous build to keep or to replace."""
    for path, content in tree(built_vit.result.repository).items():
        source, target = built_vit.result.repository / path, tmp_path / "served" / path
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    return tmp_path / "served"


@pytest.fixture
def exports_again(built_vit: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes seconds; what it gives for the same weights is known."""

    def copy(model: ChineseCLIP, kind: TowerKind, fingerprint: int, path: Path) -> None:
        path.write_bytes(built_vit.onnx_path(kind).read_bytes())

    monkeypatch.setattr("builders.build.export_tower", copy)


@pytest.mark.usefixtures("exports_again")
def test_version_2_goes_beside_1(built_vit: Built, repository: Path) -> None:
    """Everything of version 1 stays as it was, and the ensembles get a 2 as well."""
    before = tree(repository)
    result = build(built_vit.checkpoint, None, repository, model_version=2)
    after = tree(repository)
    assert result.version == 2
    assert {path: after[path] for path in before} == before
    assert {path for path in after if path not in before and not path.endswith(".gitkeep")} == {
        *(f"small_vit_{kind}/2" for kind in TOWERS),
        "small_vit_text_cached/2",
        *(f"small_vit_{kind}_tower/2" for kind in TOWERS),
        *(f"small_vit_{kind}_tower/2/{file}" for kind in TOWERS for file in ("model.onnx", "build.json")),
    }


@pytest.mark.usefixtures("exports_again")
def test_a_rebuild_replaces_artifacts_and_keeps_tuned_configs(built_vit: Built, repository: Path) -> None:
    """The version folder is replaced whole: what lay in it is gone. A config tuned by hand stays."""
    config, stale = repository / "small_vit_text_tower" / "config.pbtxt", repository / "small_vit_text_tower/1/stale"
    config.write_text(config.read_text(encoding="utf-8").replace("count: 1", "count: 2"), encoding="utf-8")
    stale.touch()
    stale.with_name("model.onnx").write_bytes(b"old")
    build(built_vit.checkpoint, None, repository)
    assert "count: 2" in config.read_text(encoding="utf-8")
    assert not stale.exists()
    assert stale.with_name("model.onnx").read_bytes() == built_vit.onnx_path("text").read_bytes()


@pytest.mark.usefixtures("exports_again")
def test_another_name_goes_beside(built_vit: Built, repository: Path) -> None:
    """Under models of its own."""
    before = tree(repository)
    result = build(built_vit.checkpoint, "shop", repository)
    after = tree(repository)
    assert result.name == "shop"
    assert {path: after[path] for path in before} == before
    assert after["shop_image_tower/1/model.onnx"] == after["small_vit_image_tower/1/model.onnx"]


def test_a_published_name_is_downloaded(built_vit: Built, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--checkpoint ViT-B-16` when there is no such file."""
    asked: list[str] = []

    def fake_download(name: str, folder: Path) -> Path:
        asked.append(name)
        raise InvalidInput("offline")

    monkeypatch.setattr("builders.build.download", fake_download)
    with pytest.raises(InvalidInput, match="offline"):
        build(Path("ViT-B-16"), None, repository)
    assert asked == ["ViT-B-16"]


# --- what fails places nothing --------------------------------------------------------------------------------------


def wrong_export(built: Built, kind: TowerKind, path: Path) -> None:
    """The right graph and fingerprint with one weight matrix of another model."""
    proto = onnx.load(built.onnx_path(kind))
    matrix = next(one for one in proto.graph.initializer if len(one.dims) == 2 and one.data_type == 1)
    array = numpy_helper.to_array(matrix)
    matrix.CopyFrom(numpy_helper.from_array(array[::-1].copy(), matrix.name))
    onnx.save(proto, path)


@pytest.mark.parametrize("wrong", TOWERS)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "over a previous build"])
def test_an_export_that_computes_something_else_places_nothing(
    built_vit: Built, repository: Path, monkeypatch: pytest.MonkeyPatch, wrong: TowerKind, fresh: bool
) -> None:
    """Neither tower, nor any config; the sentence has the figures."""

    def one_is_wrong(model: ChineseCLIP, kind: TowerKind, fingerprint: int, path: Path) -> None:
        if kind == wrong:
            wrong_export(built_vit, kind, path)
        else:
            path.write_bytes(built_vit.onnx_path(kind).read_bytes())

    monkeypatch.setattr("builders.build.export_tower", one_is_wrong)
    target = repository.with_name("fresh") if fresh else repository
    before = tree(target)
    with pytest.raises(ExportFailed, match=rf"^{wrong} tower: cosine -?0\.\d+, .* so nothing was placed$"):
        build(built_vit.checkpoint, None, target)
    assert tree(target) == before


@pytest.mark.usefixtures("exports_again")
def test_an_export_of_other_weights_is_noticed(built_vit: Built, repository: Path, tmp_path: Path) -> None:
    """By the fingerprint in it, before any vector is compared."""
    model = random_model(SMALL_SPECS["vit"])
    with torch.no_grad():
        model.logit_scale.fill_(1.0)  # which no embedding depends on
    save_checkpoint(model, tmp_path / "other")
    before = tree(repository)
    with pytest.raises(ExportFailed, match=rf"carries fingerprint {built_vit.result.fingerprint}, not \d+$"):
        build(tmp_path / "other", None, repository)
    assert tree(repository) == before


def test_an_exception_in_the_middle_leaves_the_previous_build(
    built_vit: Built, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text tower is done, the image tower fails: both stay the old ones, and nothing is left lying about."""

    def fails_late(model: ChineseCLIP, kind: TowerKind, fingerprint: int, path: Path) -> None:
        if kind == "image":
            raise OSError("no space left on device")
        path.write_bytes(built_vit.onnx_path(kind).read_bytes())

    monkeypatch.setattr("builders.build.export_tower", fails_late)
    before = tree(repository)
    with pytest.raises(OSError, match="no space"):
        build(built_vit.checkpoint, None, repository)
    assert tree(repository) == before


_KILLED_BUILD = """
import os, signal, sys
from importlib.metadata import version
from pathlib import Path
import builders.build

def copies_then_dies(model, kind, fingerprint, path):
    if kind == "image":
        os.kill(os.getpid(), signal.SIGKILL)
    path.write_bytes(Path(sys.argv[3]).read_bytes())

builders.build.export_tower = copies_then_dies
builders.build.build(Path(sys.argv[1]), None, Path(sys.argv[2]))
"""


def test_a_kill_in_the_middle_leaves_the_previous_build(built_vit: Built, repository: Path) -> None:
    """SIGKILL while the image tower is exported; only a hidden folder is left, which Triton does not load."""
    before = tree(repository)
    arguments = [str(built_vit.checkpoint), str(repository), str(built_vit.onnx_path("text"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", _KILLED_BUILD, *arguments], env=environment, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    after = tree(repository)
    assert {path: after[path] for path in before} == before
    assert {path.split(os.sep)[0][:7] for path in after if path not in before} == {".build-"}


def test_weights_above_the_limit_go_to_a_file_of_their_own(
    built_vit: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a relative name, so that the folder can be moved into place."""
    monkeypatch.setattr(onnx_export, "MAX_EMBEDDED_BYTES", 1000)
    (tmp_path / "staging").mkdir()
    onnx_export.save_proto(onnx.load(built_vit.onnx_path("image")), tmp_path / "staging" / "model.onnx")
    (tmp_path / "staging").rename(tmp_path / "1")
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "1" / "model.onnx").stat().st_size < 200_000
    fingerprint = built_vit.result.fingerprint
    assert measure_parity(built_vit.model, "image", tmp_path / "1" / "model.onnx", fingerprint).passed


# --- wrong usage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_version", "reason"),
    [
        ("Two Words", 1, r"served name 'Two Words': expected lower-case letters, digits and underscores"),
        ("图文", 1, r"model name '图文': expected letters"),
        ("../up", 1, r"served name '\.\./up'"),
        (None, 0, r"version 0: expected 1 or more"),
    ],
)
def test_a_bad_name_or_version_is_refused(
    built_vit: Built, tmp_path: Path, name: str | None, model_version: int, reason: str
) -> None:
    """Before anything is exported or written."""
    with pytest.raises(InvalidInput, match=reason):
        build(built_vit.checkpoint, name, tmp_path / "served", model_version)
    assert not (tmp_path / "served").exists()


def test_a_name_taken_by_another_shape_is_refused(built_resnet: Built, repository: Path) -> None:
    """The configs that stand there would not fit the new towers, and a build keeps configs."""
    before = tree(repository)
    with pytest.raises(InvalidInput, match=r"image_tower/config\.pbtxt: has pixel_values .*another --name$"):
        build(built_resnet.checkpoint, "small_vit", repository, model_version=2)
    assert tree(repository) == before
