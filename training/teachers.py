"""What a teacher is, and those that compute: any checkpoint this project reads, and CLIP-like Hugging Face folders.

teacher = ModelTeacher(Path("clip_cn_vit-l-14.pt"), torch.device("cuda"))
features = teacher.embed(batch)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from training.batch import Batch, InputIds
from training.pixels import as_floats
from tuwen.checkpoint import load_checkpoint
from tuwen.errors import InvalidInput, MissingDependency
from tuwen.fingerprint import model_fingerprint
from tuwen.model import ChineseCLIP
from tuwen.specs import CLS_ID, IMAGE_MEAN, IMAGE_STD, PAD_ID, SEP_ID, UNK_ID
from tuwen.tokenizer import VOCAB_PATH, pad_rows


@dataclass(frozen=True)
class TeacherFeatures:
    """A teacher's of one process's share of a batch, float32, unit length, without gradient.

    Attributes:
        image_embeds: (b, Dt); where a picture is unreadable, anything finite.
        text_embeds: (t, Dt).
        logit_scale: (), the learned log.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    logit_scale: Tensor


class Teacher(Protocol):
    @property
    def embed_dim(self) -> int:
        """Dt."""

    def embed(self, batch: Batch) -> TeacherFeatures:
        """The rows of this process.

        Raises:
            InvalidInput: a picture or a text is unknown to it.
        """


class Encoder(Protocol):
    """A model with an image and a text side, on its device, that is not trained."""

    embed_dim: int
    resolution: int
    mean: Sequence[float]
    std: Sequence[float]
    logit_scale: Tensor

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(n, Dt) of pixel_values (n, 3, R, R), normalised by its mean and std."""

    def encode_text(self, texts: Sequence[InputIds]) -> Tensor:
        """(n, Dt)."""

    @property
    def fingerprint(self) -> int:
        """63 bits of its weights."""


class ModelTeacher:
    """Computes its features at each step, of the pictures as the student sees them.

    Its own resolution and normalisation: pixels are resized bicubic, antialiased, if theirs differs.
    """

    def __init__(self, path: Path, device: torch.device, chunk_size: int = 0) -> None:
        """
        Args:
            chunk_size: pictures or texts at a time; 0 takes all at once.
        Raises:
            InvalidInput: `path` is no checkpoint, or its folder no CLIP-like model.
            MissingDependency: a Hugging Face folder, and transformers is not installed.
        """
        self.encoder = load_encoder(path, device)
        self._device, self._chunk_size = device, chunk_size

    @property
    def embed_dim(self) -> int:
        return self.encoder.embed_dim

    def embed(self, batch: Batch) -> TeacherFeatures:
        images, texts = self.embed_images(batch.pixels), self.embed_texts(batch.texts)
        return TeacherFeatures(images, texts, self.encoder.logit_scale)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """float32 (n, Dt), unit length, of pixels uint8 (n, 3, R, R) of any R."""
        mean, std = (
            torch.tensor(values, device=self._device)[:, None, None] for values in (self.encoder.mean, self.encoder.std)
        )

        def encode(chunk: Tensor) -> Tensor:
            resized = _resize(as_floats(chunk.to(self._device)), self.encoder.resolution)
            return self.encoder.encode_image((resized - mean) / std)

        return self._chunked(encode, pixels)

    def embed_texts(self, texts: Sequence[InputIds]) -> Tensor:
        """float32 (n, Dt), unit length, order kept."""
        # Texts of like length share a chunk, so that none is padded to the longest of all.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        embeds = self._chunked(self.encoder.encode_text, [texts[index] for index in order])
        return embeds[torch.tensor(order, dtype=torch.int64, device=embeds.device).argsort()]

    # Not inference_mode, whose tensors no loss with a gradient can use.
    @torch.no_grad()
    def _chunked(self, encode: Callable[[Any], Tensor], rows: Any) -> Tensor:
        size = self._chunk_size or max(1, len(rows))
        parts = [encode(rows[start : start + size]).float() for start in range(0, len(rows), size)]
        empty = torch.zeros(0, self.embed_dim, device=self._device)
        return F.normalize(torch.cat(parts), dim=-1) if parts else empty


def _resize(pixels: Tensor, resolution: int) -> Tensor:
    if pixels.shape[-1] == resolution:
        return pixels
    size = (resolution, resolution)
    resized = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 1)  # bicubic overshoots at edges


def load_encoder(path: Path, device: torch.device) -> Encoder:
    """See `ModelTeacher`."""
    if _is_other_hugging_face(path):
        return _HuggingFaceEncoder(path, device)
    return _ChineseEncoder(load_checkpoint(path).to(device))


def _is_other_hugging_face(path: Path) -> bool:
    """A folder of transformers', and not of its ChineseCLIPModel, which load_checkpoint reads."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # load_checkpoint says what is wrong
    return isinstance(config, dict) and config.get("model_type", "chinese_clip") != "chinese_clip"


class _ChineseEncoder:
    mean: Sequence[float] = IMAGE_MEAN
    std: Sequence[float] = IMAGE_STD

    def __init__(self, model: ChineseCLIP) -> None:
        self._model = model.requires_grad_(False)
        self.embed_dim, self.resolution = model.spec.embed_dim, model.spec.vision.resolution
        self.logit_scale = model.logit_scale.detach()

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return self._model.encode_image(pixel_values)

    def encode_text(self, texts: Sequence[InputIds]) -> Tensor:
        input_ids = torch.from_numpy(pad_rows(texts, max(map(len, texts))))
        return self._model.encode_text(input_ids.to(self.logit_scale.device))

    @property
    def fingerprint(self) -> int:
        return model_fingerprint(self._model.spec, self._model.state_dict())


class _HuggingFaceEncoder:
    """A CLIPModel, SiglipModel or the like, with its own tokenizer: input_ids are put back into words for it."""

    mean: Sequence[float]
    std: Sequence[float]

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise MissingDependency(f"{path}: this teacher is read by transformers: pip install transformers") from None
        try:
            model = AutoModel.from_pretrained(path, local_files_only=True)
            self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # a folder may be wrong in any way, and transformers raises what its parts raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InvalidInput(f"{path}: transformers cannot read this teacher: {reason}") from None
        sides = ("get_image_features", "get_text_features", "logit_scale")
        resolution = getattr(getattr(model.config, "vision_config", None), "image_size", None)
        if resolution is None or not all(hasattr(model, name) for name in sides):
            raise InvalidInput(f"{path}: a {type(model).__name__} is no teacher, expected a model like CLIPModel")
        self._model = model.float().eval().requires_grad_(False).to(device)
        self.resolution = int(resolution)
        self.mean, self.std = _normalization_of(path)
        self.logit_scale = model.logit_scale.detach().reshape(())
        # SigLIP was trained on texts filled up to full length, and attends to the filling.
        self._is_siglip = model.config.model_type.startswith("siglip")
        self.embed_dim = self.encode_text([(CLS_ID, SEP_ID)]).shape[1]

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        return _pooled(self._model.get_image_features(pixel_values=pixel_values))

    def encode_text(self, texts: Sequence[InputIds]) -> Tensor:
        tokens = self._tokenizer(
            [words_of(input_ids) for input_ids in texts],
            padding="max_length" if self._is_siglip else "longest",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.logit_scale.device)
        mask = None if self._is_siglip else tokens["attention_mask"]
        return _pooled(self._model.get_text_features(input_ids=tokens["input_ids"], attention_mask=mask))

    @property
    def fingerprint(self) -> int:
        digest = hashlib.sha256(self._model.config.to_json_string().encode())
        for key, value in sorted(self._model.state_dict().items()):
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
        return int.from_bytes(digest.digest()[:8], "big") >> 1


def _pooled(output: Any) -> Tensor:
    """transformers 5 gives an output whose pooler_output is the projected feature; 4 gave the feature."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _normalization_of(path: Path) -> tuple[list[float], list[float]]:
    """Mean and std, as transformers stores them: 4 in a file of their own, 5 within the processor's."""
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (path / name).is_file():
            values = json.loads((path / name).read_text(encoding="utf-8"))
            values = values.get(section, {}) if section else values
            if "image_mean" in values and "image_std" in values:
                return values["image_mean"], values["image_std"]
    raise InvalidInput(f"{path}: no image_mean and image_std in preprocessor_config.json or processor_config.json")


def words_of(input_ids: InputIds) -> str:
    """The text that these ids stand for, for another tokenizer: lower case, what is unknown to ours left out."""
    text = ""
    for piece in (_vocabulary()[id] for id in input_ids if id not in (PAD_ID, CLS_ID, SEP_ID, UNK_ID)):
        # Only words of letters and digits are set apart: nobody writes a space before 字 or a comma.
        is_apart = _is_latin(text[-1:]) and _is_latin(piece)
        text += f" {piece}" if is_apart else piece.removeprefix("##")
    return text


def _is_latin(characters: str) -> bool:
    return characters.isascii() and characters.isalnum()


@lru_cache(maxsize=1)
def _vocabulary() -> list[str]:
    # As the tokenizer reads it: the vocabulary holds line separators other than \n as tokens.
    with open(VOCAB_PATH, encoding="utf-8", newline="\n") as lines:
        return [line.strip() for line in lines]
