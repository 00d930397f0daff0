"""Checkpoints: every format round-trips, and every broken one is named in a sentence."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from perf.published import build_cn_clip
from tests.conftest import SMALL_SPECS, random_model, two_layers
from tests.test_published_parity import inputs
from tuwen.checkpoint import infer_spec, interpolate_positions, load_checkpoint, save_checkpoint, save_official
from tuwen.errors import InvalidInput
from tuwen.model import ChineseCLIP
from tuwen.specs import SPECS


def same_weights(one: ChineseCLIP, other: ChineseCLIP) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_our_folder_round_trips_exactly_in_fp32(small_model: ChineseCLIP, tmp_path: Path) -> None:
    save_checkpoint(small_model, tmp_path / "model", "# card\n", dtype=torch.float32)
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.spec == small_model.spec
    assert same_weights(loaded, small_model)
    assert not loaded.training
    assert (tmp_path / "model" / "README.md").read_text() == "# card\n"


def test_our_folder_is_half_precision_by_default(small_model: ChineseCLIP, tmp_path: Path) -> None:
    save_checkpoint(small_model, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.dtype == torch.float32
    expected = small_model.text_projection.half().float()
    assert torch.equal(loaded.text_projection, expected)


def test_saving_replaces_the_old_folder_whole(small_model: ChineseCLIP, tmp_path: Path) -> None:
    target = tmp_path / "model"
    save_checkpoint(small_model, target)
    (target / "stale").touch()
    save_checkpoint(small_model, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert not (target / "stale").exists()


def test_a_failed_save_leaves_the_old_folder(small_model: ChineseCLIP, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "model"
    save_checkpoint(small_model, target, dtype=torch.float32)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("tuwen.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(small_model, target)
    assert same_weights(load_checkpoint(target), small_model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16"])
def test_the_official_file_loads_in_cn_clip_and_here(
    cn_clip: ModuleType, name: str, tmp_path: Path, monkeypatch
) -> None:
    spec = two_layers(name)
    monkeypatch.setitem(SPECS, name, spec)
    model, path = random_model(spec), tmp_path / "official.pt"
    save_official(model, path)
    published = torch.load(path, weights_only=True)
    assert published.keys() == {"epoch", "step", "name", "state_dict"}
    theirs = build_cn_clip(spec)
    theirs.load_state_dict({key.removeprefix("module."): value for key, value in published["state_dict"].items()})
    ours = load_checkpoint(path)
    assert ours.spec == spec
    pixel_values, input_ids = inputs(spec)
    with torch.inference_mode():
        difference = ours.get_similarity(pixel_values, input_ids)[0] - theirs.get_similarity(pixel_values, input_ids)[0]
    assert difference.abs().max() <= 2e-5


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_architecture_is_told_from_the_shapes(name: str) -> None:
    with torch.device("meta"):
        state_dict = ChineseCLIP(SPECS[name]).state_dict()
    assert infer_spec(state_dict, Path("weights")) == SPECS[name]


def test_a_resolution_is_told_from_the_positions() -> None:
    with torch.device("meta"):
        state_dict = ChineseCLIP(SPECS["ViT-B-16"].with_resolution(384)).state_dict()
    assert infer_spec(state_dict, Path("weights")) == SPECS["ViT-B-16"].with_resolution(384)


def test_weights_of_no_architecture_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"text_projection": torch.zeros(3, 5)}}, tmp_path / "odd.pt")
    with pytest.raises(InvalidInput, match=r"odd\.pt: no known architecture .*text_projection \(3, 5\)"):
        load_checkpoint(tmp_path / "odd.pt")


def test_positions_interpolate_to_another_resolution(small_model: ChineseCLIP, tmp_path: Path) -> None:
    save_checkpoint(small_model, tmp_path / "model", dtype=torch.float32)
    larger = small_model.spec.with_resolution(small_model.spec.vision.resolution * 2)
    loaded = load_checkpoint(tmp_path / "model", larger)
    features = loaded.encode_image(torch.randn(2, 3, larger.vision.resolution, larger.vision.resolution))
    assert features.shape == (2, larger.embed_dim)
    assert torch.isfinite(features).all()


def test_interpolation_keeps_the_class_token_and_a_smooth_field() -> None:
    ramp = torch.linspace(0, 1, 4).expand(4, 4).reshape(16, 1)
    positions = torch.cat([torch.tensor([[7.0]]), ramp])
    resized = interpolate_positions(positions, 1 + 8 * 8)
    assert resized[0].item() == 7.0
    grid = resized[1:].reshape(8, 8)
    assert torch.allclose(grid, grid[0].expand(8, 8))
    assert (grid[0].diff() > 0).all()
    assert torch.equal(interpolate_positions(positions, 17), positions)


# --- broken files ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(small_model: ChineseCLIP, tmp_path: Path) -> Path:
    save_checkpoint(small_model, tmp_path / "model")
    return tmp_path / "model"


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere: there is no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InvalidInput, match=f"not a checkpoint folder, {name} is missing"):
        load_checkpoint(folder)


def test_truncated_safetensors_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InvalidInput, match=r"model\.safetensors: truncated or not a safetensors file"):
        load_checkpoint(folder)


def test_a_truncated_official_file_is_named(small_model: ChineseCLIP, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    save_official(small_model, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InvalidInput, match=r"cut\.pt: truncated or not a \.pt file"):
        load_checkpoint(path)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


def test_a_pickled_payload_is_refused_and_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save({"state_dict": _Payload(marker)}, path)
    with pytest.raises(InvalidInput, match=r"evil\.pt: not a plain weights file, refused"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(_Payload(marker)))
    with pytest.raises(InvalidInput, match=r"evil\.pt"):
        load_checkpoint(path)
    assert not marker.exists()


def test_a_wrong_architecture_names_the_key_and_both_shapes(folder: Path, small_model: ChineseCLIP) -> None:
    other = replace(small_model.spec, embed_dim=16)
    with pytest.raises(InvalidInput, match=r"model\.safetensors: does not fit .* has shape .*32.*, expected .*16"):
        load_checkpoint(folder, other)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("text_projection"), r"text_projection \(64, 32\) is missing"),
        (lambda weights: weights.update(surplus=torch.zeros(2)), r"surplus \(2,\) is not part of it"),
    ],
)
def test_missing_and_extra_keys_are_named(folder: Path, change, reason: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InvalidInput, match=reason):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"format": "other"}', "format is 'other'"),
        (json.dumps({"format": "tuwen-checkpoint-1", "architecture": {"name": "X"}}), "architecture description"),
    ],
)
def test_a_bad_config_is_named(folder: Path, config: str, reason: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(InvalidInput, match=reason):
        load_checkpoint(folder)


@pytest.mark.parametrize("spec", SMALL_SPECS.values(), ids=sorted(SMALL_SPECS))
def test_variable_text_length_equals_padding(spec) -> None:
    model = random_model(spec)
    input_ids = torch.randint(103, 2000, (2, 9))
    padded = torch.nn.functional.pad(input_ids, (0, 40))
    assert torch.allclose(model.encode_text(input_ids), model.encode_text(padded), atol=1e-5)
