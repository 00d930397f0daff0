"""Pairs of pictures and texts: `{split}_imgs.tsv` and `{split}_texts.jsonl`, as in Chinese-CLIP; or an LMDB of them.

    pairs = open_pairs(Path("data/emoji_cn"), "valid")
    pairs.image_bytes(pairs.image_ids[0])

A TSV line is `image id, tab, base64 of the picture file`; a JSONL line {"text_id", "text", "image_ids"}.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tuwen.errors import InvalidInput
from tuwen.files import atomic_file

# cn_clip reads the URL-safe alphabet, most files are written in the standard one; both are accepted.
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
# 18 digits fit in int64 and in an LMDB key. Not int() alone, which takes 1_000 as well.
_INTEGER = re.compile(rb"-?[0-9]{1,18}")


@dataclass(frozen=True)
class ImageRecord:
    """One picture: its id and its encoded file."""

    image_id: int
    encoded: bytes


@dataclass(frozen=True)
class TextRecord:
    """One text and the pictures it describes; none in some test splits."""

    text_id: int
    text: str
    image_ids: tuple[int, ...]


class PairSet(Protocol):
    """What training and evaluation read, whatever lies beneath."""

    @property
    def image_ids(self) -> Sequence[int]: ...

    @property
    def texts(self) -> Sequence[TextRecord]: ...

    def image_bytes(self, image_id: int) -> bytes:
        """The encoded picture file.

        Raises:
            InvalidInput: there is no such picture, or its base64 is broken.
        """
        ...


def open_pairs(path: Path, split: str) -> PairSet:
    """The pairs of one split: an LMDB (`PATH/SPLIT` or `PATH/lmdb/SPLIT`) if there is one, else TSV and JSONL.

    Raises:
        InvalidInput: neither is there (the sentence lists the splits that are), or a file is malformed.
    """
    from tuwen.data.lmdb import LmdbPairs

    if packed := lmdb_folder(path, split):
        return LmdbPairs(packed)
    if tsv_path(path, split).is_file():
        return TsvPairs(path, split)
    if not path.is_dir():
        raise InvalidInput(f"{path}: there is no such folder of pairs")
    found = ", ".join(sorted(splits_in(path))) or "none"
    raise InvalidInput(f"{path}: no split {split!r} as LMDB or as {tsv_path(path, split).name}; splits there: {found}")


def lmdb_folder(path: Path, split: str) -> Path | None:
    """Where the LMDB of a split lies below `path`, if there is one."""
    candidates = (path / split, path / "lmdb" / split)
    return next((one for one in candidates if (one / "pairs").is_dir() and (one / "imgs").is_dir()), None)


def splits_in(path: Path) -> set[str]:
    """Names of the splits below `path`, in either form."""
    packed = (*path.glob("*/pairs"), *path.glob("lmdb/*/pairs"))
    splits = {*tsv_splits(path), *(folder.parent.name for folder in packed)}
    return {split for split in splits if not split.startswith(".")}  # a dot opens the name of unfinished work


def tsv_splits(path: Path) -> list[str]:
    """Names of the splits that lie in `path` as TSV files, sorted."""
    return sorted(file.name.removesuffix("_imgs.tsv") for file in path.glob("*_imgs.tsv"))


def tsv_path(data_dir: Path, split: str) -> Path:
    return data_dir / f"{split}_imgs.tsv"


def jsonl_path(data_dir: Path, split: str) -> Path:
    return data_dir / f"{split}_texts.jsonl"


class TsvPairs:
    """A split held in memory, for sets of up to some ten thousand pictures; pack larger ones with `tuwen data lmdb`."""

    def __init__(self, data_dir: Path, split: str) -> None:
        self._path = tsv_path(data_dir, split)
        self._images = {record.image_id: record.encoded for record in iter_images(tsv_path(data_dir, split))}
        self.texts = list(iter_texts(jsonl_path(data_dir, split), known_images=self._images.keys()))
        self.image_ids = list(self._images)

    def image_bytes(self, image_id: int) -> bytes:
        if image_id not in self._images:
            raise InvalidInput(f"{self._path}: picture {image_id} is missing")
        return self._images[image_id]


# --- reading ------------------------------------------------------------------------------------------------


def iter_images(path: Path) -> Iterator[ImageRecord]:
    """The pictures of a TSV, one at a time.

    Raises:
        InvalidInput: the file is missing, empty or malformed; the sentence names file and line.
    """
    seen: set[int] = set()
    for number, line in _lines(path):
        image_id_text, tab, encoded = line.partition(b"\t")
        if not tab:
            raise InvalidInput(f"{path}:{number}: no tab, expected `image id, tab, base64`")
        image_id = parse_image_id(image_id_text, f"{path}:{number}")
        if image_id in seen:
            raise InvalidInput(f"{path}:{number}: image id {image_id} appears twice")
        seen.add(image_id)
        yield ImageRecord(image_id, decode_base64(encoded, f"{path}:{number}"))


def iter_texts(path: Path, known_images: Iterable[int] | None = None) -> Iterator[TextRecord]:
    """The texts of a JSONL, one at a time.

    Args:
        known_images: ids that `image_ids` may name; None allows any.
    Raises:
        InvalidInput: the file is missing, empty or malformed, or names an unknown picture.
    """
    known = None if known_images is None else set(known_images)
    seen: set[int] = set()
    for number, line in _lines(path):
        record = _parse_text(line, f"{path}:{number}")
        if record.text_id in seen:
            raise InvalidInput(f"{path}:{number}: text_id {record.text_id} appears twice")
        seen.add(record.text_id)
        unknown = [image_id for image_id in record.image_ids if known is not None and image_id not in known]
        if unknown:
            raise InvalidInput(f"{path}:{number}: image_ids names {unknown[0]}, which is not in the split's TSV")
        yield record


def decode_base64(encoded: bytes, where: str) -> bytes:
    """Standard or URL-safe base64 to bytes.

    Raises:
        InvalidInput: it is neither, or empty; `where` opens the sentence.
    """
    try:
        decoded = base64.b64decode(encoded.translate(_TO_STANDARD), validate=True)
    except binascii.Error as error:
        raise InvalidInput(f"{where}: bad base64: {error}") from None
    if not decoded:
        raise InvalidInput(f"{where}: the picture is empty")
    return decoded


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, stripped line) of every line that is not blank."""
    found = False
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line := line.strip():
                    found = True
                    yield number, line
    except FileNotFoundError:
        raise InvalidInput(f"{path}: there is no such file") from None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    if not found:
        raise InvalidInput(f"{path}: empty, expected a record a line")


def parse_image_id(text: bytes, where: str) -> int:
    """The id written as decimal digits.

    Raises:
        InvalidInput: it is anything else; `where` opens the sentence.
    """
    if not _INTEGER.fullmatch(text):
        shown = text[:20].decode("utf-8", "replace")
        raise InvalidInput(f"{where}: image id is {shown!r}, expected an integer of at most 18 digits")
    return int(text)


def _parse_text(line: bytes, where: str) -> TextRecord:
    try:
        values = json.loads(line.decode("utf-8-sig"))  # bytes would let json guess at UTF-16
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # ValueError itself for an integer of thousands of digits
        raise InvalidInput(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidInput(f"{where}: a JSON {type(values).__name__}, expected an object")
    for field, kind in (("text_id", int), ("text", str), ("image_ids", list)):
        if field not in values:
            raise InvalidInput(f"{where}: field {field!r} is missing")
        if not isinstance(values[field], kind) or isinstance(values[field], bool):
            raise InvalidInput(f"{where}: {field} is a {type(values[field]).__name__}, expected {kind.__name__}")
    if not all(type(image_id) is int for image_id in values["image_ids"]):  # isinstance would take true for 1
        raise InvalidInput(f"{where}: image_ids holds something other than integers")
    if any("\ud800" <= character <= "\udfff" for character in values["text"]):
        raise InvalidInput(f"{where}: text holds half of a surrogate pair, which is not Unicode text")
    return TextRecord(values["text_id"], values["text"], tuple(values["image_ids"]))


# --- writing ------------------------------------------------------------------------------------------------


def write_images(path: Path, records: Iterable[ImageRecord]) -> None:
    """Write a TSV, atomically."""
    with atomic_file(path) as file:
        for record in records:
            file.write(f"{record.image_id}\t".encode() + base64.b64encode(record.encoded) + b"\n")


def write_texts(path: Path, records: Iterable[TextRecord]) -> None:
    """Write a JSONL, atomically."""
    with atomic_file(path) as file:
        for record in records:
            values = {"text_id": record.text_id, "text": record.text, "image_ids": list(record.image_ids)}
            file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
