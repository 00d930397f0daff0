"""What features are made of: the pictures or the texts of an input, each with its id, in an order that never changes.

    source = open_source(Path("data/emoji_cn"), "valid", "images")
    for image_id, encoded in source.read(0, 100): ...

An input is a folder of pictures, the TSV and JSONL or LMDB of a split, shards (a glob), or a Parquet list. Sources can
be pickled, so that another process reads on; none holds a picture.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from eval.engine import Unusable
from tuwen.data.lmdb import LmdbPairs
from tuwen.data.pairs import (
    TextRecord,
    decode_base64,
    iter_texts,
    jsonl_path,
    open_pairs,
    parse_image_id,
    splits_in,
    tsv_path,
)
from tuwen.data.shards import ensure_index, find_shards, line_offsets, parse_line, read_index
from tuwen.errors import InvalidInput
from tuwen.image_transform import IMAGE_FORMATS, MAX_IMAGE_BYTES

Side = Literal["images", "texts"]
SIDES: tuple[Side, ...] = ("images", "texts")
Id = int | str
Payload = bytes | str
_MAX_ID_BYTES = 24  # 18 digits, a sign and the tab
_GLOB_CHARACTERS = frozenset("*?[")


class Source(Protocol):
    """One side of an input.

    Attributes:
        description: of the input, for a person.
        digest: equal as long as the input is; of what lies in files their names, sizes and times are looked at.
        has_integer_ids: whether ids are integers; else they are strings.
    """

    @property
    def description(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def has_integer_ids(self) -> bool: ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[tuple[Id, Payload | Unusable]]:
        """Ids and picture files, or texts, of positions start..stop-1; why, where one cannot be read."""


def open_source(data: Path, split: str, side: Side) -> Source:
    """One side of an input.

    Raises:
        InvalidInput: there is none, or a line of it has no id; the sentence names file and line.
        MissingDependency: it is Parquet, and pyarrow is not installed.
    """
    if files := _parquet_files(data):
        from eval.parquet_source import ParquetColumn

        return ParquetColumn(files, side)
    if not data.exists() and not _GLOB_CHARACTERS.isdisjoint(str(data)):
        return _shards(data, side)
    if (data / "pairs").is_dir() and (data / "imgs").is_dir():  # the split's own folder
        data, split = data.parent, data.name
    if not splits_in(data):
        return _folder(data, side)
    return _pictures_of_pairs(data, split) if side == "images" else _texts_of_pairs(data, split)


def sides_of(data: Path) -> tuple[Side, ...]:
    """The sides that an input has."""
    if files := _parquet_files(data):
        from eval.parquet_source import columns_of

        return tuple(side for side in SIDES if side in columns_of(files))
    return ("images",) if data.is_dir() and not splits_in(data) and not (data / "pairs").is_dir() else SIDES


def _parquet_files(data: Path) -> list[Path]:
    """A Parquet file, those in a folder, or those of a glob, sorted; none where the input is something else."""
    if data.is_file():
        return [data] if data.suffix == ".parquet" else []
    if data.is_dir():
        return sorted(data.glob("*.parquet"))
    if data.suffix == ".parquet" and not _GLOB_CHARACTERS.isdisjoint(data.name):
        return sorted(data.parent.glob(data.name))
    return []


def _shards(pattern: Path, side: Side) -> Source:
    shards = find_shards(str(pattern))
    for shard in shards:
        ensure_index(shard)
    lines = Lines.of(shards, [read_index(shard) for shard in shards])
    return LinePictures(str(pattern), lines, repeats=True) if side == "images" else ShardTexts(str(pattern), lines)


def _folder(data: Path, side: Side) -> Source:
    if side == "texts":
        raise InvalidInput(f"{data}: has no texts: neither pairs of a split nor Parquet lie in it")
    return PictureFolder(data)


def _pictures_of_pairs(data: Path, split: str) -> Source:
    # Not open_pairs, which holds a TSV's pictures in memory.
    path = tsv_path(data, split)
    if path.is_file() and not _has_lmdb(data, split):
        return LinePictures(str(path), Lines.of([path], [line_offsets(path)]), repeats=False)
    pairs = open_pairs(data, split)
    assert isinstance(pairs, LmdbPairs)  # it is no TSV
    return LmdbPictures(pairs)


def _texts_of_pairs(data: Path, split: str) -> Source:
    path = jsonl_path(data, split)
    if path.is_file() and not _has_lmdb(data, split):
        return ListedTexts(str(path), iter_texts(path))
    return ListedTexts(f"{data} ({split})", open_pairs(data, split).texts)


def _has_lmdb(data: Path, split: str) -> bool:
    return any((folder / "pairs").is_dir() for folder in (data / split, data / "lmdb" / split))


def file_digest(kind: str, files: Iterable[tuple[str, Path]]) -> str:
    """Of files by name, size and time of change: reading them would take as long as embedding them."""
    digest = hashlib.sha256(kind.encode())
    for name, path in files:
        stat = path.stat()
        digest.update(json.dumps([name, stat.st_size, stat.st_mtime_ns]).encode() + b"\n")
    return digest.hexdigest()


def read_picture(path: Path) -> bytes | Unusable:
    """A picture file, unless it is missing or larger than any that is decoded."""
    try:
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            return Unusable(f"image has {size} bytes, the limit is {MAX_IMAGE_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return Unusable(f"cannot be read: {getattr(error, 'strerror', None) or error}")


class PictureFolder:
    """Picture files below a folder, known by their suffix; ids are their paths in there, sorted."""

    has_integer_ids = False

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InvalidInput(f"{folder}: there is no such folder, file or glob")
        self.description, self._folder = str(folder), folder
        self._names = sorted(_picture_names(folder))
        if not self._names:
            raise InvalidInput(f"{folder}: no picture in it")
        self.digest = file_digest("folder", ((name, folder / name) for name in self._names))

    def __len__(self) -> int:
        return len(self._names)

    def read(self, start: int, stop: int) -> Iterator[tuple[Id, Payload | Unusable]]:
        """As `Source`."""
        for name in self._names[start:stop]:
            # A name that is not UTF-8 cannot be an id as it is.
            yield os.fsencode(name).decode("utf-8", "replace"), read_picture(self._folder / name)


def _picture_names(folder: Path) -> Iterator[str]:
    """Paths in there of the files with a suffix of a format that is decoded, with / between."""
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in IMAGE_FORMATS}
    for parent, _, files in os.walk(folder):
        below = Path(parent).relative_to(folder)
        yield from ((below / file).as_posix() for file in files if Path(file).suffix.lower() in suffixes)


@dataclass(frozen=True)
class Lines:
    """Lines of several files: which file, and from where to where.

    Attributes:
        file_of, starts, stops: int64 (lines,).
    """

    files: tuple[Path, ...]
    file_of: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]

    @classmethod
    def of(cls, files: Sequence[Path], offsets: Sequence[npt.NDArray[np.int64]]) -> Lines:
        """Of files with `read_index`'s offsets."""
        counts = [len(one) - 1 for one in offsets]
        return cls(
            tuple(files),
            np.repeat(np.arange(len(files)), counts),
            np.concatenate([one[:-1] for one in offsets]),
            np.concatenate([one[1:] for one in offsets]),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, positions: Iterable[int], most: int | None = None) -> Iterator[tuple[str, bytes]]:
        """(where, line) of each, `most` bytes of it at most; positions in rising order open each file once."""
        for number, group in groupby(positions, key=lambda position: int(self.file_of[position])):
            first = int(np.searchsorted(self.file_of, number))
            with open(self.files[number], "rb") as file:
                for position in group:
                    start, stop = int(self.starts[position]), int(self.stops[position])
                    file.seek(start)
                    yield f"{self.files[number]}:{position - first + 1}", file.read(min(stop - start, most or stop))

    @property
    def digest(self) -> str:
        return file_digest("lines", ((path.name, path) for path in self.files))


class LinePictures:
    """Pictures in base64, a line each: `image id, tab, base64`, and in shards `tab, caption`."""

    has_integer_ids = True

    def __init__(self, description: str, lines: Lines, repeats: bool) -> None:
        """Args: repeats: whether a picture may stand in several lines, of which the first is read."""
        self.description, self._lines, self.digest = description, lines, lines.digest
        ids = np.empty(len(lines), np.int64)
        for index, (where, head) in enumerate(lines.read(range(len(lines)), _MAX_ID_BYTES)):
            ids[index] = parse_image_id(head.partition(b"\t")[0].strip(), where)
        _, first = np.unique(ids, return_index=True)
        if not repeats and len(first) != len(ids):
            doubled = ids[np.setdiff1d(np.arange(len(ids)), first)[0]]
            raise InvalidInput(f"{description}: image id {doubled} appears twice")
        self._positions = np.sort(first)
        self._ids = ids[self._positions]

    def __len__(self) -> int:
        return len(self._positions)

    def read(self, start: int, stop: int) -> Iterator[tuple[Id, Payload | Unusable]]:
        """As `Source`."""
        lines = self._lines.read(self._positions[start:stop].tolist())
        for image_id, (where, line) in zip(self._ids[start:stop].tolist(), lines, strict=True):
            fields = line.strip().split(b"\t")
            try:
                yield image_id, decode_base64(fields[1] if len(fields) > 1 else b"", where)
            except InvalidInput as error:
                yield image_id, Unusable(str(error))


class ShardTexts:
    """Captions of shards, a line each; ids count lines from 0, through the shards in order of their names."""

    has_integer_ids = True

    def __init__(self, description: str, lines: Lines) -> None:
        self.description, self._lines, self.digest = description, lines, lines.digest

    def __len__(self) -> int:
        return len(self._lines)

    def read(self, start: int, stop: int) -> Iterator[tuple[Id, Payload | Unusable]]:
        """As `Source`."""
        for text_id, (where, line) in zip(range(start, stop), self._lines.read(range(start, stop)), strict=True):
            try:
                yield text_id, parse_line(line, where).text
            except InvalidInput as error:
                yield text_id, Unusable(str(error))


class LmdbPictures:
    """Pictures of a split's LMDB, by rising id."""

    has_integer_ids = True

    def __init__(self, pairs: LmdbPairs) -> None:
        self.description, self._pairs = str(pairs.split_dir), pairs
        self._ids = np.array(pairs.image_ids, np.int64)
        self.digest = file_digest("lmdb", [("data.mdb", pairs.split_dir / "imgs" / "data.mdb")])

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, start: int, stop: int) -> Iterator[tuple[Id, Payload | Unusable]]:
        """As `Source`."""
        for image_id in self._ids[start:stop].tolist():
            try:
                yield image_id, self._pairs.image_bytes(image_id)
            except InvalidInput as error:
                yield image_id, Unusable(str(error))


class ListedTexts:
    """Texts of a split, held in memory; their digest is of the texts themselves."""

    has_integer_ids = True

    def __init__(self, description: str, records: Iterable[TextRecord]) -> None:
        self.description = description
        self._items = [(record.text_id, record.text) for record in records]
        digest = hashlib.sha256(b"texts")
        for item in self._items:
            digest.update(json.dumps(item).encode() + b"\n")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._items)

    def read(self, start: int, stop: int) -> Iterator[tuple[Id, Payload | Unusable]]:
        """As `Source`."""
        yield from self._items[start:stop]
