"""The sample really converted, saved, and run by the evaluator; and what must be refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from builders import coreml_export, coreml_parity
from builders.coreml_export import ExportResult, Request, check_package, export_coreml, export_model
from builders.coreml_parity import BOUNDS, Bound, parity_items
from builders.coreml_towers import Precision, text_buckets, trace_tower
from builders.mil_evaluator import Package, UnusablePackage, load_package
from builders.mil_evaluator.description import ArrayFeature, ImageFeature
from builders.mil_evaluator.program import BlobReference
from builders.mil_evaluator.wire import Message
from builders.towers import TOWERS, ExportFailed, TowerKind, sample_pictures
from tests.conftest import SMALL_SPECS, random_model
from tuwen.checkpoint import load_checkpoint
from tuwen.cli import app
from tuwen.errors import InvalidInput, MissingDependency
from tuwen.fingerprint import model_fingerprint
from tuwen.image_transform import decode_image, normalize_pixels, resize_image
from tuwen.model import ChineseCLIP
from tuwen.specs import SPECS
from tuwen.tokenizer import VOCAB_PATH, default_tokenizer, pad_rows

SAMPLE = Path(__file__).parents[2] / "samples" / "emoji_tiny"
WEIGHTS = Path("Data", "com.apple.CoreML", "weights", "weight.bin")
MODEL = Path("Data", "com.apple.CoreML", "model.mlmodel")

pytest.importorskip("coremltools", reason="pip install 'tuwen[coreml]'")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sample() -> ChineseCLIP:
    return load_checkpoint(SAMPLE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return export_coreml(SAMPLE, tmp_path_factory.mktemp("coreml") / "ios", Request(("fp16", "palette8")))


@pytest.fixture(scope="module")
def packages(exported: ExportResult) -> dict[TowerKind, Package]:
    return {kind: load_package(exported.out / exported.towers["fp16"][kind].path) for kind in TOWERS}


@pytest.mark.parametrize("precision", ["fp16", "palette8"])
@pytest.mark.parametrize("kind", TOWERS)
def test_both_precisions_keep_to_pytorch(exported: ExportResult, precision: Precision, kind: TowerKind) -> None:
    tower = exported.towers[precision][kind]
    assert tower.parity.keeps(BOUNDS[precision])
    assert tower.parity.num_items > coreml_parity.NUM_REAL
    assert ("constexpr_lut_to_dense" in tower.operations) is (precision == "palette8")


def test_a_palette_halves_the_size(exported: ExportResult) -> None:
    sizes = {one: sum(tower.size_bytes for tower in both.values()) for one, both in exported.towers.items()}
    assert sizes["palette8"] < 0.56 * sizes["fp16"]


def test_each_precision_has_a_folder_that_stands_alone(exported: ExportResult) -> None:
    assert sorted(path.name for path in exported.out.iterdir()) == ["fp16", "palette8"]
    for folder in exported.out.iterdir():
        assert sorted(path.name for path in folder.iterdir()) == [
            "model.json", "tiny_rn_image.mlpackage", "tiny_rn_text.mlpackage", "vocab.txt"
        ]  # fmt: skip
        assert (folder / "vocab.txt").read_bytes() == VOCAB_PATH.read_bytes()
        inside = {path.relative_to(folder).name for path in folder.rglob("*.mlpackage/**/*") if path.is_file()}
        assert inside == {"Manifest.json", "model.mlmodel", "weight.bin"}


def test_the_card_tells_an_app_what_it_needs(exported: ExportResult, sample: ChineseCLIP) -> None:
    card = json.loads((exported.out / "fp16" / "model.json").read_text(encoding="utf-8"))
    assert card["fingerprint"] == str(model_fingerprint(sample.spec, sample.state_dict()))
    assert card["logit_scale"] == pytest.approx(sample.logit_scale.item())
    assert (card["resolution"], card["context_length"], card["embed_dim"]) == (64, 52, 128)
    assert card["text_buckets"] == [8, 12, 16, 24, 32, 52]
    assert card["image"]["package"] == "tiny_rn_image.mlpackage"
    assert card["text"]["min_cosine_with_pytorch"] >= BOUNDS["fp16"].min_cosine


def test_metadata_is_what_xcode_shows(packages: dict[TowerKind, Package], exported: ExportResult) -> None:
    for package in packages.values():
        description = package.description
        assert description.author == "Tuwen"
        assert description.version == "1"
        assert "emoji_tiny" in description.licence
        assert "Chinese-CLIP Tiny-RN" in description.summary
        assert description.user_defined["fingerprint"] == str(exported.fingerprint)
        assert "tuwen calibrate" in description.user_defined["calibration"]
        assert float(description.user_defined["logit_scale"]) > 0
        assert all(feature.summary for feature in (description.inputs | description.outputs).values())
    image, ids = packages["image"].description.inputs["image"], packages["text"].description.inputs["input_ids"]
    assert isinstance(image, ImageFeature)
    assert (image.width, image.height, image.is_bgr) == (64, 64, False)
    assert isinstance(ids, ArrayFeature)
    assert (ids.dtype, sorted(ids.shapes)) == ("int32", [(1, length) for length in (8, 12, 16, 24, 32, 52)])


def test_the_image_input_is_rgb_pixels_as_they_are(packages: dict[TowerKind, Package], sample: ChineseCLIP) -> None:
    """What the package does with 0 to 255 is `normalize_pixels`; swapped channels would not pass."""
    pixels = resize_image(decode_image(sample_pictures(3)[2]), 64)
    with torch.inference_mode():
        expected, swapped = (
            sample.encode_image(torch.from_numpy(normalize_pixels(one))[None], normalize=True)[0].numpy()
            for one in (pixels, pixels[:, :, ::-1])
        )
    found = packages["image"].run({"image": pixels})["image_embeds"][0]
    assert found @ expected > 0.99999
    assert found @ swapped < 0.999


def test_a_text_is_the_same_at_every_length(packages: dict[TowerKind, Package]) -> None:
    """Padding is masked inside the program."""
    row = default_tokenizer().encode_ids("戴墨镜的猫")
    rows = [
        packages["text"].run({"input_ids": pad_rows([row], length).astype(np.int32)})["text_embeds"][0]
        for length in (8, 12, 52)
    ]
    assert np.linalg.norm(rows[0]) == pytest.approx(1, abs=1e-3)
    for other in rows[1:]:
        assert np.abs(rows[0] - other).max() < 5e-4  # half precision's step below 1


def test_what_core_ml_would_refuse_is_refused(packages: dict[TowerKind, Package]) -> None:
    with pytest.raises(UnusablePackage, match=r"input_ids: shape \[1, 9\], expected one of"):
        packages["text"].run({"input_ids": np.ones((1, 9), np.int32)})
    with pytest.raises(UnusablePackage, match=r"image: float32 \[3, 64, 64\], expected uint8 \[64, 64, 3\]"):
        packages["image"].run({"image": np.ones((3, 64, 64), np.float32)})
    with pytest.raises(UnusablePackage, match=r"given \['ids'\], expected \['input_ids'\]"):
        packages["text"].run({"ids": np.ones((1, 8), np.int32)})


@pytest.mark.parametrize(("architecture", "ios"), [("resnet", 17), ("vit", 18)])
def test_newer_targets_and_the_other_precisions(architecture: str, ios: int, tmp_path: Path) -> None:
    """Of a ResNet and a ViT; iOS 18's operations for attention and for compressed weights are others than 16's."""
    model = random_model(SMALL_SPECS[architecture])
    request = Request(("fp32", "int8", "palette6"), ios, num_real=2)
    towers = export_model(model, "random", tmp_path / "out", request).towers
    kinds = set(towers["int8"]["text"].operations)
    assert ("scaled_dot_product_attention" in kinds) is (ios == 18)
    assert ("constexpr_blockwise_shift_scale" if ios == 18 else "constexpr_affine_dequantize") in kinds
    assert towers["fp32"]["image"].parity.max_abs_diff < 1e-4


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(exported: ExportResult, tmp_path: Path) -> Path:
    """A copy of the text package, for a test to damage."""
    path = tmp_path / "text.mlpackage"
    shutil.copytree(exported.out / exported.towers["fp16"]["text"].path, path)
    return path


def test_one_flipped_byte_of_a_weight_is_refused(damaged: Path, sample: ChineseCLIP) -> None:
    """Of the last matrix: the exponent of one number."""
    package = load_package(damaged)
    last = next(each for each in reversed(package.program.operations) if each.kind == "linear")
    (weight,) = last.arguments["weight"]
    name = weight.name  # type: ignore[union-attr]
    (blob,) = next(each for each in package.program.operations if each.name == name).arguments["val"]
    assert isinstance(blob, BlobReference)
    content = bytearray((damaged / WEIGHTS).read_bytes())
    start = int.from_bytes(content[blob.offset + 16 : blob.offset + 24], "little")
    content[start + 1] ^= 0x40
    (damaged / WEIGHTS).write_bytes(content)
    with pytest.raises(ExportFailed, match=r"text tower in fp16: cosine .*at least 0\.999.*nothing was placed"):
        check_package(damaged, "text", "fp16", parity_items(sample, "text", 4))


def test_truncated_weights_are_refused(damaged: Path) -> None:
    content = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(UnusablePackage, match=r"text\.mlpackage: weights/weight\.bin ends at \d+ bytes, expected \d+"):
        load_package(damaged)


def test_missing_weights_and_manifest_are_refused(damaged: Path) -> None:
    (damaged / WEIGHTS).unlink()
    with pytest.raises(UnusablePackage, match=r"weights/weight\.bin is missing"):
        load_package(damaged)
    (damaged / "Manifest.json").unlink()
    with pytest.raises(UnusablePackage, match="no Core ML package"):
        load_package(damaged)


def test_a_damaged_model_is_a_sentence(damaged: Path) -> None:
    """Whatever byte of the program is wrong, or wherever it ends: it runs, or it is refused; nothing else is raised."""
    content = (damaged / MODEL).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for index in range(120):
        broken = bytearray(content)
        if index % 4:
            broken[random.integers(len(content))] ^= 1 << int(random.integers(8))
        else:
            del broken[random.integers(len(content)) :]
        (damaged / MODEL).write_bytes(broken)
        try:
            load_package(damaged).run({"input_ids": np.array([[101, 200, 300, 102, 0, 0, 0, 0]], np.int32)})
        except UnusablePackage:
            refused += 1
    assert refused > 30  # every truncation, and many a flip


def test_an_unknown_operation_is_named(damaged: Path) -> None:
    content = (damaged / MODEL).read_bytes()
    assert Message.parse(memoryview(content)).has(502)
    (damaged / MODEL).write_bytes(content.replace(b"layer_norm\x12", b"layer_morn\x12"))
    with pytest.raises(UnusablePackage, match=r"^text\.mlpackage: the evaluator does not know operation layer_morn$"):
        load_package(damaged)


@pytest.mark.parametrize("bound", [Bound(1.1, 1, 1), Bound(0, 1e-9, 1), Bound(0, 1, 0)])
def test_what_fails_the_gate_is_not_placed(bound: Bound, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ios"
    out.mkdir()
    (out / "model.json").write_text("an earlier export")
    monkeypatch.setitem(BOUNDS, "fp16", bound)  # type: ignore[arg-type]
    with pytest.raises(ExportFailed, match="nothing was placed"):
        export_model(random_model(SMALL_SPECS["vit"]), "random", out, Request(num_real=1))
    assert [path.name for path in tmp_path.iterdir()] == ["ios"]
    assert [path.read_text() for path in out.iterdir()] == ["an earlier export"]


def test_no_number_passes_no_gate() -> None:
    nothing = coreml_parity.Parity(float("nan"), float("nan"), float("nan"), 1)
    assert not nothing.keeps(Bound(-1, 1e9, 1e9))


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ExportFailed, match=r"training mode.*call model\.eval\(\)"):
        trace_tower(random_model(SMALL_SPECS["vit"]).train(), "text")


def test_a_folder_of_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.json").touch()
    (tmp_path / "App.swift").touch()
    with pytest.raises(InvalidInput, match=r"holds App\.swift, which is of no export and would be lost"):
        export_coreml(SAMPLE, tmp_path)
    with pytest.raises(InvalidInput, match="is a file"):
        export_coreml(SAMPLE, tmp_path / "App.swift")


@pytest.mark.parametrize(
    ("request_of", "sentence"),
    [
        ({"precisions": ("fp8",)}, "precision fp8: expected some of fp32, fp16"),
        ({"precisions": ()}, "precision none"),
        ({"minimum_ios": 15}, "target iOS 15: expected one of 16, 17, 18"),
        ({"version": 0}, "version 0"),
    ],
)
def test_a_wrong_request_is_a_sentence(request_of: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        Request(**request_of)


@pytest.fixture
def without_coremltools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)


@pytest.mark.usefixtures("without_coremltools")
def test_a_missing_coremltools_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match=r"pip install 'tuwen\[coreml\]'"):
        export_coreml(SAMPLE, tmp_path / "ios")


@pytest.mark.usefixtures("without_coremltools")
def test_the_evaluator_needs_no_coremltools(exported: ExportResult) -> None:
    load_package(exported.out / exported.towers["fp16"]["text"].path)


def test_the_command_prints_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: ExportResult) -> None:
    """The export itself is tested above."""
    asked = []

    def pretends(checkpoint: Path, out: Path, request: Request, on_stage: object) -> ExportResult:
        asked.append((checkpoint, out, request))
        return exported

    monkeypatch.setattr(coreml_export, "export_coreml", pretends)
    arguments = ["export", "coreml", "--checkpoint", str(SAMPLE), "--out", str(tmp_path), "--target", "17"]
    result = CliRunner().invoke(app, [*arguments, "--precision", "fp16", "--precision", "palette8", "--json"])
    assert asked == [(SAMPLE, tmp_path, Request(("fp16", "palette8"), 17))]
    answer = json.loads(result.stdout)
    assert answer["towers"]["fp16"]["text"]["path"] == "fp16/tiny_rn_text.mlpackage"
    assert answer["towers"]["palette8"]["image"]["parity"]["min_cosine"] > 0.99


@pytest.mark.parametrize("name", sorted(SPECS))
def test_buckets_end_with_the_context_length(name: str) -> None:
    buckets = text_buckets(SPECS[name])
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == SPECS[name].context_length
