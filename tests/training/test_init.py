"""Where weights begin: towers filled from published files compute what those files' own models compute."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from perf.published import build_cn_clip
from tests.conftest import SMALL_SPECS, SMALL_TEXT, random_model, randomise
from tests.test_published_parity import inputs
from training.init import freeze, initial_model, keep_frozen_in_eval
from training.recipe import ModelSection
from tuwen.checkpoint import save_checkpoint
from tuwen.errors import InvalidInput
from tuwen.model import ChineseCLIP
from tuwen.specs import SPECS

pytestmark = pytest.mark.usefixtures("one_thread")

# float32 sums in another order: as tests/test_published_parity.py.
TOLERANCE = 2e-5
SPEC_OF_BERT = replace(SMALL_SPECS["vit"], name="Small-BERT", text=replace(SMALL_TEXT, vocab_size=500))


@pytest.fixture(autouse=True)
def small_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (*SMALL_SPECS.values(), SPEC_OF_BERT):
        monkeypatch.setitem(SPECS, spec.name, spec)


def test_without_a_file_the_seed_decides() -> None:
    section = ModelSection(architecture="Small-ViT")
    torch.manual_seed(3)
    one, other = initial_model(section), initial_model(section)
    torch.manual_seed(3)
    again = initial_model(section)
    assert torch.equal(one.text_projection, again.text_projection)
    assert not torch.equal(one.text_projection, other.text_projection)
    assert one.training


def test_a_checkpoint_gives_everything(small_model: ChineseCLIP, tmp_path: Path) -> None:
    save_checkpoint(small_model, tmp_path / "first", dtype=torch.float32)
    section = ModelSection(architecture=small_model.spec.name, init_checkpoint=tmp_path / "first")
    started = initial_model(section)
    assert all(torch.equal(value, started.state_dict()[key]) for key, value in small_model.state_dict().items())
    assert started.training


# --- the image tower ----------------------------------------------------------------------------------------------


def whole_model(weights: dict[str, Tensor]) -> dict[str, object]:
    """As OpenAI's state dict: the image tower among everything else."""
    others = {"text_projection": torch.zeros(3, 5), "transformer.resblocks.0.ln_1.bias": torch.zeros(3)}
    return {f"visual.{key}": value for key, value in weights.items()} | others


def published_checkpoint(weights: dict[str, Tensor]) -> dict[str, object]:
    """As Chinese-CLIP saves: fp16, under DDP's prefix, beside other things."""
    prefixed = {f"module.visual.{key}": value.half() if value.ndim else value for key, value in weights.items()}
    return {"epoch": 1, "name": "job", "state_dict": prefixed | {"module.logit_scale": torch.tensor(1.0)}}


@pytest.mark.parametrize("kind", sorted(SMALL_SPECS))
@pytest.mark.parametrize("layout", [dict, whole_model, published_checkpoint])
def test_a_published_image_tower_computes_the_same(
    cn_clip: ModuleType, kind: str, layout: Callable[[dict[str, Tensor]], dict[str, object]], tmp_path: Path
) -> None:
    """cn_clip's own tower, saved bare, in a whole model, and in half precision under a prefix; and ours from it."""
    spec = SMALL_SPECS[kind]
    theirs = build_cn_clip(spec)
    randomise(theirs)
    if layout is published_checkpoint:
        theirs.half().float()  # what the file's half precision leaves of them
    torch.save(layout(theirs.visual.state_dict()), tmp_path / "vision.pt")
    ours = initial_model(ModelSection(architecture=spec.name, init_vision=tmp_path / "vision.pt")).eval()
    pixel_values, _ = inputs(spec)
    with torch.inference_mode():
        assert (ours.encode_image(pixel_values) - theirs.visual(pixel_values)).abs().max() <= TOLERANCE
    assert ours.dtype == torch.float32


def test_an_image_tower_of_another_resolution_is_interpolated(tmp_path: Path) -> None:
    spec = SMALL_SPECS["vit"]
    larger = random_model(spec.with_resolution(64)).visual.state_dict()
    save_file(larger, tmp_path / "vision.safetensors")
    visual = initial_model(ModelSection(architecture=spec.name, init_vision=tmp_path / "vision.safetensors")).visual
    positions = visual.state_dict()["positional_embedding"]
    assert positions.shape == (17, 64)
    assert torch.equal(positions[0], larger["positional_embedding"][0])
    assert torch.equal(visual.state_dict()["conv1.weight"], larger["conv1.weight"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_torchscript_archive_says_how_to_convert_it(tmp_path: Path) -> None:
    """OpenAI's own files are such; and what the sentence says to run gives a file that loads."""
    tower = random_model(SMALL_SPECS["vit"]).visual
    path = tmp_path / "ViT-B-16.pt"
    torch.jit.trace(tower, torch.zeros(1, 3, 32, 32)).save(str(path))
    section = ModelSection(architecture="Small-ViT", init_vision=path)
    with pytest.raises(InvalidInput, match=r"ViT-B-16\.pt: a TorchScript archive") as caught:
        initial_model(section)
    _, *arguments = shlex.split(str(caught.value).split("out: ")[1])
    subprocess.run([sys.executable, *arguments], cwd=tmp_path, check=True)
    visual = initial_model(ModelSection(architecture="Small-ViT", init_vision=tmp_path / "weights.pt")).visual
    assert torch.equal(visual.state_dict()["proj"], tower.state_dict()["proj"])


# --- the text tower -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert() -> torch.nn.Module:
    """transformers' BERT of the small text tower's size, with random weights and a pooler."""
    transformers = pytest.importorskip("transformers")
    text = SPEC_OF_BERT.text
    config = transformers.BertConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.layers,
        num_attention_heads=text.num_heads,
        intermediate_size=text.intermediate_size,
        max_position_embeddings=text.max_positions,
    )
    model: torch.nn.Module = transformers.BertModel(config).eval()
    randomise(model)
    return model


def with_a_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a BertForMaskedLM of years ago: a prefix, a head, a buffer, and TensorFlow's names for LayerNorm."""
    old = {
        f"bert.{key.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": value
        for key, value in weights.items()
    }
    assert any("gamma" in key for key in old)
    head = {"cls.predictions.bias": torch.zeros(500), "cls.predictions.transform.LayerNorm.gamma": torch.ones(64)}
    return old | head | {"bert.embeddings.position_ids": torch.arange(64)[None]}


@pytest.mark.parametrize("layout", [dict, with_a_head])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "folder"])
def test_a_bert_computes_the_same(
    bert: torch.nn.Module, layout: Callable[[dict[str, Tensor]], dict[str, Tensor]], name: str, tmp_path: Path
) -> None:
    """Its hidden state at [CLS], with padding, from a file or from its folder."""
    path = tmp_path / name
    if name == "model.safetensors":
        save_file(layout(bert.state_dict()), path)
    else:
        path = path if name.endswith(".bin") else tmp_path
        torch.save(layout(bert.state_dict()), tmp_path / "pytorch_model.bin")
    ours = initial_model(ModelSection(architecture="Small-BERT", init_text=path)).eval()
    input_ids = torch.randint(1, 500, (3, 12), generator=torch.Generator().manual_seed(0))
    input_ids[1, 7:] = 0
    with torch.inference_mode():
        theirs = bert(input_ids, attention_mask=(input_ids != 0).long()).last_hidden_state[:, 0]
        difference = ours.encode_text(input_ids) - theirs @ ours.text_projection
    assert difference.abs().max() <= TOLERANCE


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("proj"), r"the image tower of Small-ViT: proj \(64, 32\) is missing$"),
        (lambda weights: weights.update(odd=torch.zeros(2)), r"odd \(2,\) is not part of it$"),
        (lambda weights: weights.update(proj=torch.zeros(64, 8)), r"proj has shape \(64, 8\), expected \(64, 32\)$"),
        (
            lambda weights: weights.clear() or weights.update(odd=torch.zeros(2), proj=torch.zeros(2)),
            r"proj has shape \(2,\), expected \(64, 32\); class_embedding \(64,\) is missing; .* \(and \d+ more\)$",
        ),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict[str, Tensor]], object], reason: str, tmp_path: Path) -> None:
    weights = random_model(SMALL_SPECS["vit"]).visual.state_dict()
    change(weights)
    torch.save(weights, tmp_path / "vision.pt")
    with pytest.raises(InvalidInput, match=rf"vision\.pt: does not fit .*{reason}"):
        initial_model(ModelSection(architecture="Small-ViT", init_vision=tmp_path / "vision.pt"))


def test_a_bert_of_another_size_is_named(bert: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(bert.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match=r"the text tower of Small-ViT: .*word_embeddings.* \(500, 64\), expected"):
        initial_model(ModelSection(architecture="Small-ViT", init_text=tmp_path))


@pytest.mark.parametrize("key", ["init_vision", "init_text"])
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.pt", None, "there is no such file of weights"),
        ("cut.safetensors", b"abc", "truncated or not a safetensors file"),
        ("cut.bin", b"abc", "refused|truncated"),
    ],
)
def test_a_file_that_is_none_is_named(key: str, name: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    section = ModelSection.model_validate({"architecture": "Small-ViT", key: tmp_path / name})
    with pytest.raises(InvalidInput, match=f"{name}: .*({reason})"):
        initial_model(section)


def test_a_folder_without_a_bert_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        initial_model(ModelSection(architecture="Small-ViT", init_text=tmp_path))


# --- freezing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "frozen"),
    [
        ({}, ()),
        ({"freeze_vision": True}, ("visual.",)),
        ({"freeze_text": True}, ("bert.", "text_projection")),
        ({"freeze_vision": True, "freeze_text": True}, ("visual.", "bert.", "text_projection")),
    ],
)
def test_a_frozen_tower_takes_no_part(
    small_model: ChineseCLIP, flags: dict[str, bool], frozen: tuple[str, ...]
) -> None:
    section = ModelSection.model_validate({"architecture": small_model.spec.name} | flags)
    freeze(small_model, section)
    for name, parameter in small_model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen or "none")), name


@pytest.mark.parametrize("flag", ["freeze_vision", "freeze_text"])
def test_a_frozen_tower_drops_nothing_and_learns_no_statistics(flag: str) -> None:
    """In training mode its features repeat, and running means stay; the other tower goes on as ever."""
    model = random_model(SMALL_SPECS["resnet"])
    section = ModelSection.model_validate({"architecture": model.spec.name, flag: True})
    model.train()
    keep_frozen_in_eval(model, section)
    pixel_values, input_ids = inputs(model.spec)
    means = model.visual.state_dict()["bn1.running_mean"].clone()
    with torch.no_grad():
        model.encode_image(pixel_values)
        texts = [model.encode_text(input_ids) for _ in range(2)]
    is_vision = flag == "freeze_vision"
    assert torch.equal(model.visual.state_dict()["bn1.running_mean"], means) == is_vision
    assert torch.equal(*texts) == (not is_vision)
