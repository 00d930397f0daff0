"""A teacher's features on disk: computed once, read at each step of many runs.

    write_teacher_features(Path("clip_cn_vit-l-14.pt"), recipe.data, Path("features/muge"))
    teacher = StoredTeacher(Path("features/muge"), recipe.data, device)

A folder of teacher.json; images_00000.safetensors (image_ids int64 (n,), image_embeds float16 (n, Dt)) and on, each of
PART_ROWS pictures; texts_00000.safetensors (text_keys, text_embeds) and on; and, last, index.safetensors, which says in
which row an id or key lies. Each file appears whole or not at all, so a kill loses a part at most.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from training.batch import Batch, InputIds
from training.recipe import DataSection
from training.teachers import ModelTeacher, TeacherFeatures
from tuwen.data.lmdb import ProgressHook
from tuwen.data.pairs import PairSet, open_pairs
from tuwen.errors import InvalidInput
from tuwen.files import atomic_file, write_text
from tuwen.image_transform import decode_image, resize_image
from tuwen.model import resolve_device
from tuwen.tokenizer import default_tokenizer, normalize_text

FORMAT = "tuwen-teacher-features-1"
PART_ROWS = 65_536  # 67 MB of 512 numbers each
INDEX_NAME = "index.safetensors"
_DECODING_THREADS = 4

Kind = Literal["images", "texts"]
# Under which names a part holds its ids or keys, and its features.
_NAMES: dict[Kind, tuple[str, str]] = {
    "images": ("image_ids", "image_embeds"),
    "texts": ("text_keys", "text_embeds"),
}


@dataclass(frozen=True)
class Description:
    """teacher.json: what the features are of; only with an equal one is a folder gone on with.

    Attributes:
        fingerprint: of the teacher's weights.
        logit_scale: the learned log.
        context_length: what texts were cut to.
        contents: a digest of all image ids and text keys, in order.
    """

    fingerprint: int
    embed_dim: int
    logit_scale: float
    context_length: int
    part_rows: int
    contents: str
    format: str = FORMAT


def text_key(input_ids: InputIds) -> int:
    """63 bits that stand for a text, the same on every machine; of 10^8 texts no two are likely to share theirs."""
    digest = hashlib.sha256(np.array(input_ids, "<i4").tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --- writing ------------------------------------------------------------------------------------------------


def write_teacher_features(
    teacher_path: Path,
    data: DataSection,
    out: Path,
    device: str | None = None,
    batch_size: int = 64,
    on_progress: ProgressHook = lambda done, total, what: None,
    part_rows: int = PART_ROWS,
) -> Path:
    """Embed every picture and caption of the training split; returns `out`. A second call goes on where one ended.

    Args:
        data: of a recipe. Unreadable pictures are left out, as many as its max_corrupt allows.
    Raises:
        InvalidInput: the data or the teacher cannot be read, or `out` holds other features.
    """
    contents = _Contents(data)
    teacher = ModelTeacher(teacher_path, resolve_device(device), batch_size)
    description = Description(
        fingerprint=teacher.encoder.fingerprint,
        embed_dim=teacher.embed_dim,
        logit_scale=float(teacher.encoder.logit_scale),
        context_length=data.context_length,
        part_rows=part_rows,
        contents=contents.digest(),
    )
    _begin(out, description)
    writer = _Writer(out, contents, teacher, batch_size, part_rows, on_progress)
    writer.write("images", contents.image_ids, writer.embed_images)
    writer.write("texts", list(contents.texts), writer.embed_texts)
    _write_index(out, part_rows)
    return out


class _Contents:
    """What there is to embed: each picture by its id, each distinct text by its key."""

    def __init__(self, data: DataSection) -> None:
        if data.shards:
            raise InvalidInput("data.shards are read as a stream: distil from the teacher itself, by distill.teacher")
        self.max_corrupt = data.max_corrupt
        self.source_of: dict[int, PairSet] = {}
        self.texts: dict[int, InputIds] = {}
        tokenizer = default_tokenizer()
        for source in data.all_sources:
            pairs = open_pairs(source.path, data.train_split)
            for image_id in pairs.image_ids:
                if self.source_of.setdefault(image_id, pairs) is not pairs:
                    raise InvalidInput(
                        f"{source.path}: picture {image_id} is in another source too, and features go by its id"
                    )
            for record in pairs.texts:
                input_ids = tuple(tokenizer.encode_ids(normalize_text(record.text), data.context_length))
                self.texts[text_key(input_ids)] = input_ids

    @property
    def image_ids(self) -> list[int]:
        return list(self.source_of)

    def digest(self) -> str:
        digest = hashlib.sha256()
        for keys in (self.source_of, self.texts):
            digest.update(np.fromiter(keys, np.int64, len(keys)).tobytes() + b"/")
        return digest.hexdigest()

    def pixels(self, image_id: int, resolution: int) -> Tensor | None:
        """uint8 (3, R, R); None if the picture is unreadable."""
        try:
            image = decode_image(self.source_of[image_id].image_bytes(image_id))
        except InvalidInput:
            return None
        return torch.tensor(resize_image(image, resolution)).permute(2, 0, 1)


def _begin(out: Path, description: Description) -> None:
    path = out / "teacher.json"
    if path.is_file():
        if _read_description(out) != description:
            raise InvalidInput(f"{out}: holds features of another teacher or of other data; remove it, or name another")
        return
    write_text(path, json.dumps(asdict(description), indent=2) + "\n")


# Features of some of the ids or keys, and of which: those that could be embedded.
Embed = Callable[[Sequence[int]], tuple[list[int], Tensor]]


@dataclass
class _Writer:
    out: Path
    contents: _Contents
    teacher: ModelTeacher
    batch_size: int
    part_rows: int
    on_progress: ProgressHook
    num_corrupt: int = 0

    def write(self, kind: Kind, keys: Sequence[int], embed: Embed) -> None:
        """The parts that are not there yet."""
        for start in range(0, len(keys), self.part_rows):
            path, end = _part_path(self.out, kind, start // self.part_rows), min(start + self.part_rows, len(keys))
            if path.is_file():
                self.on_progress(end, len(keys), f"embedding {kind}")
                continue
            embedded, features = [], [torch.zeros(0, self.teacher.embed_dim).half()]
            for batch_start in range(start, end, self.batch_size):
                batch_end = min(batch_start + self.batch_size, end)
                some, theirs = embed(keys[batch_start:batch_end])
                embedded += some
                features.append(theirs.half().cpu())
                self.on_progress(batch_end, len(keys), f"embedding {kind}")
            key_name, embed_name = _NAMES[kind]
            _write(path, {key_name: _int64(embedded), embed_name: torch.cat(features)})

    def embed_images(self, image_ids: Sequence[int]) -> tuple[list[int], Tensor]:
        resolution = self.teacher.encoder.resolution
        with ThreadPoolExecutor(_DECODING_THREADS) as pool:
            decoded = list(pool.map(lambda image_id: self.contents.pixels(image_id, resolution), image_ids))
        readable = {image_id: pixels for image_id, pixels in zip(image_ids, decoded, strict=True) if pixels is not None}
        self.num_corrupt += len(image_ids) - len(readable)
        if self.num_corrupt > self.contents.max_corrupt:
            unreadable = next(image_id for image_id in image_ids if image_id not in readable)
            raise InvalidInput(
                f"picture {unreadable} is unreadable, and data.max_corrupt is {self.contents.max_corrupt}; "
                "what is embedded so far is kept"
            )
        none = torch.zeros(0, 3, resolution, resolution, dtype=torch.uint8)
        pixels = torch.stack(list(readable.values())) if readable else none
        return list(readable), self.teacher.embed_images(pixels)

    def embed_texts(self, keys: Sequence[int]) -> tuple[list[int], Tensor]:
        return list(keys), self.teacher.embed_texts([self.contents.texts[key] for key in keys])


def _write_index(out: Path, part_rows: int) -> None:
    """Where each key is: sorted, and beside it the row, as if every part but the last were full."""
    tensors: dict[str, Tensor] = {}
    for kind, (key_name, _) in _NAMES.items():
        parts = [_mapped(path, key_name) for path in sorted(out.glob(f"{kind}_*.safetensors"))]
        rows = [torch.arange(len(keys)) + number * part_rows for number, keys in enumerate(parts)]
        keys, order = torch.cat([_int64([]), *parts]).sort()
        tensors |= {key_name: keys, f"{kind}_rows": torch.cat([_int64([]), *rows])[order]}
    _write(out / INDEX_NAME, tensors)


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_file(path) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


# --- reading ------------------------------------------------------------------------------------------------


class StoredTeacher:
    """What `write_teacher_features` wrote, looked up by image id and text; files are mapped, not read, into memory.

    Its pictures are the whole ones, whatever crop or colours the student is shown.
    """

    def __init__(self, path: Path, data: DataSection, device: torch.device) -> None:
        """
        Raises:
            InvalidInput: `path` is not complete; or `data` makes new captions, which have no stored features.
        """
        self.path, self._device = path, device
        self.description = _read_description(path)
        if not (path / INDEX_NAME).is_file():
            raise InvalidInput(f"{path}: not complete, {INDEX_NAME} is missing; write it again, it goes on from there")
        for key in ("join_captions", "drop_tokens"):
            if getattr(data, key):
                raise InvalidInput(f"{path}: data.{key} makes new captions, of which no features are stored; set it 0")
        if data.context_length != self.description.context_length:
            raise InvalidInput(
                f"{path}: of texts cut to {self.description.context_length} tokens, "
                f"data.context_length is {data.context_length}"
            )
        self._images, self._texts = _Table(path, "images", self.description), _Table(path, "texts", self.description)

    @property
    def embed_dim(self) -> int:
        return self.description.embed_dim

    def embed(self, batch: Batch) -> TeacherFeatures:
        readable = batch.is_readable.cpu().numpy()
        image_embeds = torch.zeros(len(readable), self.embed_dim)
        image_embeds[batch.is_readable.cpu()] = self._images.rows_of(np.array(batch.image_ids, np.int64)[readable])
        text_embeds = self._texts.rows_of(np.array([text_key(input_ids) for input_ids in batch.texts], np.int64))
        return TeacherFeatures(
            image_embeds.to(self._device),
            text_embeds.to(self._device),
            torch.tensor(self.description.logit_scale, device=self._device),
        )


class _Table:
    """The features of one side, by key."""

    def __init__(self, path: Path, kind: Kind, description: Description) -> None:
        self._path, self._kind, self._description = path, kind, description
        self._keys = _mapped(path / INDEX_NAME, _NAMES[kind][0]).numpy()
        self._rows = _mapped(path / INDEX_NAME, f"{kind}_rows").numpy()
        self._parts: dict[int, Tensor] = {}

    def rows_of(self, keys: npt.NDArray[np.int64]) -> Tensor:
        """float32 (n, Dt), unit length.

        Raises:
            InvalidInput: there is none of a key.
        """
        places = np.searchsorted(self._keys, keys)
        known = places < len(self._keys)
        known[known] = self._keys[places[known]] == keys[known]
        if not known.all():
            what = "picture" if self._kind == "images" else "text with the key"
            raise InvalidInput(f"{self._path}: no features of {what} {keys[~known][0]}; they are of other data")
        embeds = torch.zeros(len(keys), self._description.embed_dim)
        numbers, rows = np.divmod(self._rows[places], self._description.part_rows)
        for number in np.unique(numbers):
            chosen = numbers == number
            embeds[torch.from_numpy(chosen)] = self._part(int(number))[torch.from_numpy(rows[chosen])].float()
        return F.normalize(embeds, dim=-1)  # float16 left them a little off

    def _part(self, number: int) -> Tensor:
        if number not in self._parts:
            path = _part_path(self._path, self._kind, number)
            self._parts[number] = _mapped(path, _NAMES[self._kind][1])
        return self._parts[number]


def _part_path(folder: Path, kind: Kind, number: int) -> Path:
    return folder / f"{kind}_{number:05}.safetensors"


def _mapped(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, mapped into memory: read when looked at, and no file stays open.

    Raises:
        InvalidInput: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"{path}: cannot be read: {error}") from None


def _read_description(folder: Path) -> Description:
    path = folder / "teacher.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        description = Description(**values)
    except OSError as error:
        raise InvalidInput(f"{folder}: no features of a teacher, teacher.json: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{path}: not a description of features: {error}") from None
    if description.format != FORMAT:
        raise InvalidInput(f"{path}: format is {description.format!r}, expected {FORMAT!r}")
    return description
