"""Features on disk: a folder of Parquet parts and a manifest; one Parquet file; or Chinese-CLIP's JSONL.

    ids, embeddings = open_features(Path("features/images"))

Parquet has columns `id` (int64 or string) and `embedding` (a fixed-size list of float16 or float32), uncompressed, and
says in its metadata which model made it. A part is the same bytes however often it is written.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eval import chinese_clip_files
from eval.feature_sources import SIDES, Id, Side
from tuwen.errors import InvalidInput, MissingDependency
from tuwen.files import atomic_file, atomic_path, write_text

FORMAT = "tuwen-features-1"
MANIFEST_NAME, SKIPPED_NAME = "manifest.json", "skipped.jsonl"
Dtype = Literal["float16", "float32"]
Embeddings = npt.NDArray[np.float16] | npt.NDArray[np.float32]
Ids = list[int] | list[str]

# An array above this lies in a file mapped into memory, whose pages the system can take back.
LARGE_BYTES = 2**30
_BLOCK_ROWS = 8192
_MODEL_KEY, _SKIPPED_KEY = b"tuwen.model", b"tuwen.skipped"
_JSONL_KIND: dict[Side, chinese_clip_files.Kind] = {"images": "image", "texts": "text"}
# Chinese-CLIP's own endings. Source: cn_clip/eval/extract_features.py
JSONL_ENDING: dict[Side, str] = {"images": "img_feat.jsonl", "texts": "txt_feat.jsonl"}


def arrow() -> ModuleType:
    """pyarrow with pyarrow.parquet and pyarrow.types, imported when Parquet is read or written.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
        import pyarrow.types
    except ImportError as error:
        raise MissingDependency(f"features need pyarrow ({error}): pip install 'tuwen[eval]'") from None
    return pyarrow  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Manifest:
    """manifest.json: what the parts of a folder are of; only with an equal one is a folder gone on with.

    Attributes:
        input_digest: see `Source`.
        num_items: of the input, those to be skipped among them.
        engine: torch, onnx, triton or ray.
        fingerprint: of the model.
        part_rows: items of the input to a part; the last may have fewer.
    """

    side: Side
    input: str
    input_digest: str
    num_items: int
    engine: str
    model: str
    fingerprint: int
    embed_dim: int
    dtype: Dtype
    has_integer_ids: bool
    part_rows: int
    format: str = FORMAT

    @property
    def num_parts(self) -> int:
        return -(-self.num_items // self.part_rows)

    def num_items_of(self, part: int) -> int:
        """Items of the input that a part covers."""
        return min(self.part_rows, self.num_items - part * self.part_rows)

    @property
    def model_note(self) -> dict[bytes, bytes]:
        """What a Parquet file says of the model."""
        note = {"model": self.model, "fingerprint": self.fingerprint}
        return {_MODEL_KEY: json.dumps(note).encode()}


@dataclass(frozen=True)
class Skipped:
    """An item that could not be embedded, and why."""

    id: Id
    reason: str


def part_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.parquet"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_text(folder / MANIFEST_NAME, json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Raises InvalidInput: there is none, or it is of another format."""
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidInput(f"{folder}: no folder of features, {MANIFEST_NAME}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{path}: not a manifest of features: {error}") from None
    if manifest.format != FORMAT:
        raise InvalidInput(f"{path}: format is {manifest.format!r}, expected {FORMAT!r}")
    return manifest


# --- writing ------------------------------------------------------------------------------------------------


def part_bytes(manifest: Manifest, ids: Sequence[Id], rows: Sequence[Any], skipped: Sequence[Skipped]) -> bytes:
    """A part as a Parquet file; what was skipped is in its metadata, so that both appear at once."""
    pa = arrow()
    file = io.BytesIO()
    flat = np.array(rows, manifest.dtype).reshape(-1)
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(flat), manifest.embed_dim)
    note = json.dumps([asdict(one) for one in skipped], ensure_ascii=False).encode()
    schema = _schema(manifest).with_metadata(manifest.model_note | {_SKIPPED_KEY: note})
    table = pa.Table.from_arrays([pa.array(ids, schema.field("id").type), embedding], schema=schema)
    with _parquet_writer(file, schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def _schema(manifest: Manifest) -> Any:
    pa = arrow()
    number = pa.float16() if manifest.dtype == "float16" else pa.float32()
    listed = pa.list_(pa.field("element", number, nullable=False), manifest.embed_dim)
    return pa.schema(
        [
            pa.field("id", pa.int64() if manifest.has_integer_ids else pa.string(), nullable=False),
            pa.field("embedding", listed, nullable=False),
        ]
    )


def _parquet_writer(where: Any, schema: Any) -> Any:
    # Embeddings are as good as random: neither a dictionary nor compression makes them smaller.
    return arrow().parquet.ParquetWriter(
        where, schema, compression="none", use_dictionary=False, write_statistics=["id"]
    )


def write_part(folder: Path, number: int, content: bytes) -> None:
    with atomic_file(part_path(folder, number)) as file:
        file.write(content)


def write_skipped(folder: Path, manifest: Manifest) -> list[Skipped]:
    """skipped.jsonl of a complete folder, from its parts: {"id", "reason"} a line, in the input's order."""
    found = [one for number in range(manifest.num_parts) for one in skipped_of(part_path(folder, number))]
    lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found)
    write_text(folder / SKIPPED_NAME, "".join(lines))
    return found


def skipped_of(part: Path) -> list[Skipped]:
    """What a part's metadata says was skipped."""
    metadata = _open(part).schema_arrow.metadata or {}
    return [Skipped(**one) for one in json.loads(metadata.get(_SKIPPED_KEY, b"[]"))]


def write_single_file(folder: Path, manifest: Manifest) -> Path:
    """FOLDER.parquet: all parts as one file, a row group each."""
    path = folder.with_name(folder.name + ".parquet")
    schema = _schema(manifest).with_metadata(manifest.model_note)
    with atomic_path(path) as temporary, _parquet_writer(temporary, schema) as writer:
        for number in range(manifest.num_parts):
            table = _open(part_path(folder, number)).read()
            writer.write_table(table.replace_schema_metadata(schema.metadata))
    return path


def write_jsonl(folder: Path, manifest: Manifest) -> Path:
    """FOLDER.img_feat.jsonl or FOLDER.txt_feat.jsonl, as Chinese-CLIP's extract_features.py writes them.

    Its scripts count on integer ids, and so does our reader; strings are written for other programs.
    """
    path = folder.with_name(f"{folder.name}.{JSONL_ENDING[manifest.side]}")
    with atomic_file(path) as file:
        for ids, embeddings in iter_features(folder):
            some: Sequence[Id] = ids
            for one, row in zip(some, embeddings.astype(np.float32), strict=True):
                file.write(chinese_clip_files.feature_line(_JSONL_KIND[manifest.side], one, row))
    return path


# --- reading ------------------------------------------------------------------------------------------------


def open_features(path: Path) -> tuple[Ids, Embeddings]:
    """Ids, and embeddings (N, D) in the type they are stored in; above 1 GiB they are mapped, not held, in memory.

    Args:
        path: a folder with a manifest, a Parquet file, or Chinese-CLIP's JSONL, which is read as float32.
    Raises:
        InvalidInput: it is none of these, not complete, or malformed.
    """
    num_rows, embed_dim, dtype = _shape(path)
    ids: list[Any] = []
    embeddings = _allocate((num_rows, embed_dim), dtype)
    for some, rows in iter_features(path):
        embeddings[len(ids) : len(ids) + len(some)] = rows
        ids += some
    return ids, embeddings


def iter_features(path: Path, block_rows: int = _BLOCK_ROWS) -> Iterator[tuple[Ids, Embeddings]]:
    """As `open_features`, up to `block_rows` rows at a time, for more than memory holds."""
    if (parts := _parts(path)) is None:
        yield from _iter_jsonl(path, block_rows)
        return
    for part in parts:
        for batch in _open(part).iter_batches(block_rows, columns=["id", "embedding"]):
            embedding = batch.column("embedding")
            flat = embedding.flatten().to_numpy(zero_copy_only=False)
            yield batch.column("id").to_pylist(), flat.reshape(-1, embedding.type.list_size)


def fingerprint_of(path: Path) -> int | None:
    """Of the model that made the features; None where the file does not say, as JSONL cannot."""
    parts = _parts(path)
    note = (_open(parts[0]).schema_arrow.metadata or {}).get(_MODEL_KEY) if parts else None
    return None if note is None else int(json.loads(note)["fingerprint"])


def _parts(path: Path) -> list[Path] | None:
    """The Parquet files that `path` stands for, in order; None for JSONL."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else None
    sides = [side for side in SIDES if (path / side / MANIFEST_NAME).is_file()]
    if sides:
        raise InvalidInput(f"{path}: holds features of {' and '.join(sides)}; name one, as {path / sides[0]}")
    if not path.exists():
        raise InvalidInput(f"{path}: there are no such features")
    manifest = read_manifest(path)
    parts = [part_path(path, number) for number in range(manifest.num_parts)]
    if missing := sum(not part.is_file() for part in parts):
        raise InvalidInput(
            f"{path}: not complete, {missing} of {len(parts)} parts are missing; "
            "run `tuwen features` as before, it goes on from there"
        )
    return parts


def _shape(path: Path) -> tuple[int, int, Dtype]:
    """Rows, D and type of number, without reading embeddings where the format allows it."""
    if (parts := _parts(path)) is None:
        return _jsonl_shape(path)
    pa = arrow()
    found: set[tuple[int, Dtype]] = set()
    num_rows = 0
    for part in parts:
        file = _open(part)
        schema = file.schema_arrow
        kind = schema.field("embedding").type if {"id", "embedding"} <= set(schema.names) else None
        if kind is None or not pa.types.is_fixed_size_list(kind) or str(kind.value_type) not in ("halffloat", "float"):
            raise InvalidInput(f"{part}: expected columns id, and embedding, a fixed-size list of float16 or float32")
        found.add((kind.list_size, "float16" if str(kind.value_type) == "halffloat" else "float32"))
        num_rows += file.metadata.num_rows
    if len(found) != 1:
        raise InvalidInput(f"{path}: its parts differ in shape or type: {sorted(found)}")
    return num_rows, *found.pop()


def _allocate(shape: tuple[int, int], dtype: Dtype) -> Embeddings:
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if size <= LARGE_BYTES:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:  # has no name, and is gone when the array is
        return np.memmap(file, dtype, "w+", shape=shape)


def _open(path: Path) -> Any:
    pa = arrow()
    try:
        return pa.parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise InvalidInput(f"{path}: not a Parquet file that can be read: {error}; remove it to make it anew") from None


def _jsonl_shape(path: Path) -> tuple[int, int, Dtype]:
    with open(path, "rb") as file:
        num_rows = sum(not line.isspace() for line in file)
    first = next(chinese_clip_files.iter_features(path, _jsonl_kind(path), 1))
    return num_rows, first.embeds.shape[1], "float32"


def _iter_jsonl(path: Path, block_rows: int) -> Iterator[tuple[Ids, Embeddings]]:
    for block in chinese_clip_files.iter_features(path, _jsonl_kind(path), block_rows):
        yield block.ids.tolist(), block.embeds


def _jsonl_kind(path: Path) -> chinese_clip_files.Kind:
    """By the field that the first line has; what may be wrong with the file is its reader's to say."""
    with open(path, "rb") as file:
        first = next((line for line in file if not line.isspace()), b"")
    return "text" if b'"text_id"' in first else "image"
