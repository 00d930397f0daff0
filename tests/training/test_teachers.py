"""Teachers that compute: ours and those of Hugging Face, from the pixels and texts that a student sees."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tests.conftest import SMALL_SPECS, random_model
from tests.shapes import shape_pairs
from training.batch import Batch, InputIds, Positives
from training.distill import open_teacher
from training.recipe import DataSection, DistillSection
from training.teachers import ModelTeacher, Teacher, words_of
from tuwen.checkpoint import save_checkpoint
from tuwen.embed import embed_texts
from tuwen.errors import InvalidInput, MissingDependency
from tuwen.image_transform import preprocess_image
from tuwen.tokenizer import default_tokenizer, normalize_text

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TEXTS = ("红色的大圆", "黑方块", "一个黄色的三角在左边", "蓝")


def ids_of(text: str) -> InputIds:
    return tuple(default_tokenizer().encode_ids(normalize_text(text)))


def pixels_of(encoded: bytes, resolution: int) -> Tensor:
    """uint8 (3, R, R)."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB").resize((resolution, resolution), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def batch_of(resolution: int) -> Batch:
    pictures = list(shape_pairs().images.items())[:3]
    return Batch(
        epoch=0,
        number=0,
        image_ids=tuple(image_id for image_id, _ in pictures),
        pixels=torch.stack([pixels_of(encoded, resolution) for _, encoded in pictures]),
        is_readable=torch.ones(3, dtype=torch.bool),
        texts=tuple(map(ids_of, TEXTS)),
        positives=Positives(torch.zeros(3, 4, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)),
    )


def teacher_at(path: Path, chunk_size: int = 0) -> Teacher:
    distill = DistillSection(teacher=path, logit_weight=1)
    return open_teacher(distill, DataSection(path=Path("pairs")), CPU, chunk_size)


# --- ours -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(SMALL_SPECS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    save_checkpoint(random_model(SMALL_SPECS[request.param]), path, dtype=torch.float32)
    return path


@pytest.mark.parametrize("chunk_size", [0, 1, 2])
def test_it_embeds_as_the_model_does(checkpoint: Path, chunk_size: int) -> None:
    """Pictures and texts in their order, in chunks of any size, without a gradient and ready for one."""
    teacher = ModelTeacher(checkpoint, CPU, chunk_size)
    model = random_model(SMALL_SPECS["vit" if teacher.encoder.resolution == 32 else "resnet"])
    resolution = model.spec.vision.resolution
    features = teacher.embed(batch_of(resolution))
    pixel_values = [preprocess_image(one, resolution) for one in list(shape_pairs().images.values())[:3]]
    with torch.no_grad():
        image_embeds = model.encode_image(torch.from_numpy(np.stack(pixel_values)), normalize=True)
    # Other batches sum in another order: a few float32 roundings of numbers below 1.
    torch.testing.assert_close(features.image_embeds, image_embeds, rtol=0, atol=2e-5)
    torch.testing.assert_close(features.text_embeds, torch.from_numpy(embed_texts(model, TEXTS)), rtol=0, atol=2e-5)
    assert features.logit_scale == model.logit_scale
    assert teacher.embed_dim == features.image_embeds.shape[1] == 32
    assert not features.image_embeds.requires_grad
    student = torch.randn(3, 32, requires_grad=True)
    (student * features.image_embeds).sum().backward()  # refused for inference_mode's tensors


def test_pixels_of_another_resolution_are_resized(checkpoint: Path) -> None:
    """Close to what Pillow's bicubic of the same pixels gives."""
    teacher = ModelTeacher(checkpoint, CPU)
    own, other = (teacher.embed(batch_of(resolution)).image_embeds for resolution in (teacher.encoder.resolution, 48))
    assert F.cosine_similarity(own, other).min() > 0.98
    assert not torch.equal(own, other)


def test_a_missing_teacher_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no such checkpoint"):
        teacher_at(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidInput, match=r"not a checkpoint folder, config\.json is missing"):
        teacher_at(tmp_path / "folder")


# --- of Hugging Face ------------------------------------------------------------------------------------------------

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]  # not CLIP's


def save_tokenizer(path: Path) -> None:
    """A character is a token; 0 pads, 2 ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1, "<end>": 2}
    vocabulary |= {character: 3 + index for index, character in enumerate(sorted(set("".join(TEXTS))))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(path)


def hugging_face_model(kind: str) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = vision | {"vocab_size": 40, "max_position_embeddings": 12}
    vision |= {"image_size": 24, "patch_size": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=text | tokens, vision_config=vision, projection_dim=10)).eval()
    return SiglipModel(SiglipConfig(text_config=text | {"projection_size": 16}, vision_config=vision)).eval()


def save_hugging_face(path: Path, kind: str, processor_name: str = "preprocessor_config.json") -> nn.Module:
    model = hugging_face_model(kind)
    model.save_pretrained(path)  # type: ignore[operator]
    save_tokenizer(path)
    values: dict[str, object] = {"image_mean": MEAN, "image_std": STD}
    if processor_name == "processor_config.json":
        values = {"image_processor": values}
    (path / processor_name).write_text(json.dumps(values), encoding="utf-8")
    return model


def pooled(output: object) -> Tensor:
    return getattr(output, "pooler_output", output)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "width", "processor_name"),
    [("clip", 10, "preprocessor_config.json"), ("siglip", 16, "processor_config.json")],
)
def test_a_hugging_face_folder_is_a_teacher(tmp_path: Path, kind: str, width: int, processor_name: str) -> None:
    """At its own resolution, by its own mean and std, and its own tokenizer."""
    model = save_hugging_face(tmp_path / kind, kind, processor_name)
    teacher = teacher_at(tmp_path / kind)
    batch = batch_of(24)
    features = teacher.embed(batch)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    characters = sorted(set("".join(TEXTS)))
    rows = [[3 + characters.index(character) for character in text] + [2] for text in TEXTS]
    length = 12 if kind == "siglip" else max(map(len, rows))  # SigLIP was trained on padded texts, without a mask
    input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = (torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]).long()
    with torch.no_grad():
        images = pooled(model.get_image_features(pixel_values=(batch.pixels / 255 - mean) / std))  # type: ignore[operator]
        texts = pooled(
            model.get_text_features(  # type: ignore[operator]
                input_ids=input_ids, attention_mask=None if kind == "siglip" else mask
            )
        )
    torch.testing.assert_close(features.image_embeds, F.normalize(images, dim=-1), rtol=0, atol=2e-5)
    torch.testing.assert_close(features.text_embeds, F.normalize(texts, dim=-1), rtol=0, atol=2e-5)
    assert teacher.embed_dim == width
    assert features.logit_scale.shape == ()


def test_without_transformers_the_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    with pytest.raises(MissingDependency, match="pip install transformers"):
        teacher_at(tmp_path)


def test_a_folder_that_is_no_teacher_is_a_sentence(tmp_path: Path) -> None:
    """Another kind of model; one without what normalises its pictures; one of no known kind."""
    from transformers import BertConfig, BertModel

    bert = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    with pytest.raises(InvalidInput, match="a BertModel is no teacher, expected a model like CLIPModel"):
        teacher_at(tmp_path / "bert")
    save_hugging_face(tmp_path / "clip", "clip")
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    with pytest.raises(InvalidInput, match="no image_mean and image_std"):
        teacher_at(tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clop"}', encoding="utf-8")
    with pytest.raises(InvalidInput, match="transformers cannot read this teacher"):
        teacher_at(tmp_path / "clip")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("一只猫", "一只猫"),
        ("红色T恤", "红色t恤"),
        ("iPhone 15 手机壳，防摔", "iphone 15手机壳，防摔"),
        ("a red sweatshirt", "a red sweatshirt"),
        ("中文 abc def", "中文abc def"),
        ("猫\U0001f977咪", "猫咪"),
    ],
)
def test_ids_are_put_back_into_words(text: str, expected: str) -> None:
    """Of a caption nothing is lost but case, spaces beside 字, and what the vocabulary does not know."""
    assert words_of(ids_of(text)) == expected
