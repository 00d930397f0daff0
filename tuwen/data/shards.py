"""Shards: pairs as many TSV files, for sets too large to index in memory; each has its lines' offsets beside it.

    tuwen data shards --data DIR --split train --out SHARDS --shards 64

A line is `image id, tab, base64 of the picture file, tab, caption`, a pair each. `NAME.tsv.idx` is int64,
little-endian: where each line starts, then the size of the file. One that is missing, older than its shard or says
another size is made by reading the shard once.
"""

from __future__ import annotations

import base64
import os
import random
import shutil
import tempfile
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from tuwen.data.lmdb import LmdbPairs, ProgressHook
from tuwen.data.pairs import PairSet, decode_base64, open_pairs, parse_image_id
from tuwen.errors import InvalidInput
from tuwen.files import atomic_file, replace_folder

Offsets = npt.NDArray[np.int64]

_OFFSET = np.dtype("<i8")
# A picture file may have 32 MiB, which is 43 MiB as base64.
MAX_LINE_BYTES = 64 * 2**20
_BLOCK_BYTES = 8 * 2**20
_NEWLINE = 10


@dataclass(frozen=True)
class ShardRecord:
    """A pair: the encoded picture file, its id, and a caption."""

    image_id: int
    encoded: bytes
    text: str


def parse_line(line: bytes, where: str) -> ShardRecord:
    """The pair of a line.

    Raises:
        InvalidInput: it is malformed, or its picture or caption is empty; `where` opens the sentence.
    """
    fields = line.rstrip(b"\r\n").split(b"\t", 2)
    if len(fields) != 3:
        raise InvalidInput(f"{where}: {len(fields) - 1} tabs, expected `image id, tab, base64, tab, caption`")
    image_id, encoded, caption = fields
    try:
        text = caption.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{where}: the caption is not UTF-8: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise InvalidInput(f"{where}: the caption is empty")
    return ShardRecord(parse_image_id(image_id, where), decode_base64(encoded, where), text)


# --- the index ----------------------------------------------------------------------------------------------


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".idx")


def find_shards(pattern: str) -> list[Path]:
    """The shards of a glob, sorted by name; their indices are none of them.

    Raises:
        InvalidInput: there are none.
    """
    found = [Path(name) for name in sorted(glob(pattern, recursive=True)) if not name.endswith(".idx")]
    if not (shards := [path for path in found if path.is_file()]):
        raise InvalidInput(f"data.shards {pattern!r}: no file of that name; `tuwen data shards` writes them")
    return shards


def ensure_index(shard: Path) -> int:
    """Make a shard's index unless a fresh one is there; returns the number of lines, without reading the index.

    Raises:
        InvalidInput: the shard cannot be read, or the index not be written.
    """
    path = index_path(shard)
    try:
        if not _is_fresh(path, shard):
            offsets = line_offsets(shard)
            with atomic_file(path) as file:
                file.write(offsets.astype(_OFFSET).tobytes())
        return path.stat().st_size // _OFFSET.itemsize - 1
    except OSError as error:
        raise InvalidInput(f"{shard}: cannot be indexed in {path.name} beside it: {error.strerror}") from None


def read_index(shard: Path) -> Offsets:
    """int64 (lines + 1,): where each line starts, and the size of the shard."""
    return np.fromfile(index_path(shard), _OFFSET).astype(np.int64, copy=False)


def _is_fresh(path: Path, shard: Path) -> bool:
    expected, size = shard.stat(), _OFFSET.itemsize
    if not path.is_file() or path.stat().st_mtime_ns < expected.st_mtime_ns:
        return False
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length < size or length % size:
            return False
        file.seek(-size, os.SEEK_END)
        return int.from_bytes(file.read(size), "little", signed=True) == expected.st_size


def line_offsets(shard: Path) -> Offsets:
    """int64 (lines + 1,), as `read_index`: reads the file once, a block at a time.

    A blank line is none, so that one at the end does no harm.
    """
    starts, position, previous = array("q"), 0, 0
    with open(shard, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            ends = position + np.flatnonzero(np.frombuffer(block, np.uint8) == _NEWLINE)
            before = np.concatenate([[previous], ends + 1])
            starts.extend(before[:-1][ends > before[:-1]].tolist())
            previous, position = int(before[-1]), position + len(block)
    if previous < position:  # the last line has no newline
        starts.append(previous)
    return np.append(np.array(starts, np.int64), position)


# --- writing ------------------------------------------------------------------------------------------------


def write_shards(
    data_dir: Path,
    split: str,
    out_dir: Path,
    num_shards: int,
    on_progress: ProgressHook = lambda done, total, what: None,
) -> Path:
    """Write a split's pairs, shuffled, as shards of equal length; returns their folder, `OUT/SPLIT`.

    A picture is written once for each of its captions; a pair with a blank one is left out. The folder appears whole
    or not at all; one that was there stays until then.
    Raises:
        InvalidInput: the split cannot be read, or has fewer pairs than shards.
    """
    pairs = open_pairs(data_dir, split)
    count, pair_at = _numbered_pairs(pairs)
    if not 1 <= num_shards <= count:
        raise InvalidInput(f"--shards {num_shards}: expected 1 to {count}, the number of pairs")
    order = list(range(count))
    random.Random(0).shuffle(order)  # reading shuffles within a few shards only
    target = out_dir / split
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{split}.", dir=target.parent))
    try:
        for shard in range(num_shards):
            path = staging / f"{shard:05d}.tsv"
            with atomic_file(path) as file:
                for index in order[shard::num_shards]:
                    _write_pair(file, pairs, *pair_at(index))
            ensure_index(path)
            on_progress(shard + 1, num_shards, "writing shards")
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _numbered_pairs(pairs: PairSet) -> tuple[int, Callable[[int], tuple[int, str]]]:
    """How many pairs there are, and how to get (image id, text) of one."""
    if isinstance(pairs, LmdbPairs):
        return pairs.num_pairs, lambda index: pairs.pair(index)[::2]
    listed = [(image_id, record.text) for record in pairs.texts for image_id in record.image_ids]
    return len(listed), listed.__getitem__


def _write_pair(file: IO[bytes], pairs: PairSet, image_id: int, text: str) -> None:
    # White space is one space to the tokeniser, and a tab or newline would end the caption here.
    caption = " ".join(text.split())
    if not caption:
        return
    encoded = base64.b64encode(pairs.image_bytes(image_id))
    file.write(b"%d\t%b\t%b\n" % (image_id, encoded, caption.encode()))
