"""Chinese-CLIP's LMDB layout: pack a split, and read one, ours or theirs.

`SPLIT/pairs`: decimal index -> pickle of (image_id, text_id, text), one per picture and text, and `num_samples`;
`SPLIT/imgs`: image id -> base64 of the picture file, and `num_images`.
Source: Chinese-CLIP cn_clip/preprocess/build_lmdb_dataset.py. Reading trusts no pickle: tuples, strings and
integers only, any name lookup is refused.
"""

from __future__ import annotations

import base64
import io
import os
import pickle
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NoReturn
from weakref import WeakValueDictionary

import lmdb

from tuwen.data.pairs import TextRecord, decode_base64, iter_images, iter_texts, jsonl_path, parse_image_id, tsv_path
from tuwen.errors import InvalidInput
from tuwen.files import replace_folder

# Called with (done, total, what); total is 0 where it is not known.
ProgressHook = Callable[[int, int, str], None]

_INITIAL_MAP_BYTES = 64 * 2**20
# On Windows the file is as large as its map, so it is not doubled beyond this.
_MAX_GROWTH_BYTES = 2**30
_COMMIT_EVERY = 1000


# --- writing ------------------------------------------------------------------------------------------------


def write_lmdb(
    data_dir: Path,
    split: str,
    out_dir: Path | None = None,
    on_progress: ProgressHook = lambda done, total, what: None,
) -> Path:
    """Pack one split's TSV and JSONL; returns its LMDB folder, `OUT/SPLIT`, by default `DATA/lmdb/SPLIT`.

    The folder appears whole or not at all; one that was there stays until then.
    Raises:
        InvalidInput: a line is malformed, an id unknown or doubled; the sentence names file and line.
    """
    target = (out_dir or data_dir / "lmdb") / split
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{split}.", dir=target.parent))
    try:
        image_ids: set[int] = set()

        def images() -> Iterator[tuple[bytes, bytes]]:
            size = tsv_path(data_dir, split).stat().st_size if tsv_path(data_dir, split).is_file() else 0
            read = 0
            for record in iter_images(tsv_path(data_dir, split)):
                image_ids.add(record.image_id)
                encoded = base64.b64encode(record.encoded)
                read += len(encoded)
                on_progress(read, size, "packing pictures")
                yield str(record.image_id).encode(), encoded
            yield b"num_images", str(len(image_ids)).encode()

        _write_environment(staging / "imgs", images())
        _write_environment(staging / "pairs", _pair_items(jsonl_path(data_dir, split), image_ids, on_progress))
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _pair_items(path: Path, image_ids: set[int], on_progress: ProgressHook) -> Iterator[tuple[bytes, bytes]]:
    count = 0
    for record in iter_texts(path, known_images=image_ids):
        for image_id in record.image_ids:
            yield str(count).encode(), pickle.dumps((image_id, record.text_id, record.text))
            count += 1
        on_progress(count, 0, "packing pairs")
    yield b"num_samples", str(count).encode()


def _write_environment(path: Path, items: Iterable[tuple[bytes, bytes]]) -> None:
    """Put every item into a new LMDB, growing its map with the data rather than reserving a terabyte."""
    path.mkdir()
    environment = lmdb.open(str(path), map_size=_INITIAL_MAP_BYTES, sync=False)
    try:
        pending: list[tuple[bytes, bytes]] = []
        for item in items:
            pending.append(item)
            if len(pending) >= _COMMIT_EVERY:
                _commit(environment, pending)
                pending.clear()
        _commit(environment, pending)
        environment.sync(True)
    finally:
        environment.close()


def _commit(environment: lmdb.Environment, items: list[tuple[bytes, bytes]]) -> None:
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:  # the transaction was rolled back; nothing of it is there
            size = environment.info()["map_size"]
            environment.set_mapsize(size + min(size, _MAX_GROWTH_BYTES))


# --- reading ------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """One picture and one text that belong together."""

    image_id: int
    text_id: int
    text: str


class _PrimitiveUnpickler(pickle.Unpickler):
    """Builds tuples, lists, strings and numbers; anything that needs a name from a module is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"names {module}.{name}")


def load_pair(value: bytes, where: str) -> Pair:
    """The pair of a pickled value.

    Raises:
        InvalidInput: it is anything but (int or decimal str, int or decimal str, str); `where` opens the sentence.
    """
    try:
        fields = _PrimitiveUnpickler(io.BytesIO(value)).load()
        if not isinstance(fields, tuple | list) or len(fields) != 3:
            raise TypeError(f"a {type(fields).__name__}")
        image_id, text_id, text = fields
        if type(image_id) not in (int, str) or type(text_id) not in (int, str) or type(text) is not str:
            raise TypeError(f"of {', '.join(type(field).__name__ for field in fields)}")
        return Pair(int(image_id), int(text_id), text)
    except Exception as error:  # a hostile pickle raises whatever it likes; none of it is ours
        raise InvalidInput(f"{where}: not a plain (image_id, text_id, text), refused: {error}") from None


# By process and file. LMDB opens a file once a process, and a child inherits its parent's environments open.
_environments: WeakValueDictionary[tuple[int, int, int], lmdb.Environment] = WeakValueDictionary()
_environments_lock = threading.Lock()


def _open_environment(path: Path) -> lmdb.Environment:
    """The process's environment of this LMDB, opened if it is not; it closes when its last user lets go."""
    try:
        file = os.stat(path / "data.mdb")
        key = (os.getpid(), file.st_dev, file.st_ino)
        with _environments_lock:
            for other, inherited in list(_environments.items()):
                if other[0] != key[0]:
                    inherited.close()  # in this child alone; the parent's stays open
            environment = _environments.get(key)
            if environment is None:
                environment = lmdb.open(
                    str(path), readonly=True, create=False, lock=False, readahead=False, meminit=False
                )
                _environments[key] = environment
    except (lmdb.Error, OSError) as error:
        raise InvalidInput(f"{path}: cannot be opened as an LMDB: {error}") from None
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if file.st_size < expected:  # reading a missing page would kill the process with SIGBUS
        raise InvalidInput(f"{path}: data.mdb is cut off, {file.st_size} of {expected} bytes")
    return environment


class LmdbPairs:
    """A split of an LMDB as a `PairSet`; pictures are read when asked for, also from worker processes.

    A text without pictures leaves no pair, so `texts` lacks it. Also a context manager.
    """

    def __init__(self, split_dir: Path) -> None:
        self.split_dir = split_dir
        self._process = 0
        self._opened: dict[str, lmdb.Environment] = {}
        self._open()

    def _open(self) -> None:
        """LMDB environments must not cross a fork, so each process opens its own."""
        self._opened = {name: _open_environment(self.split_dir / name) for name in ("pairs", "imgs")}
        self._process = os.getpid()

    def close(self) -> None:
        """Let go of the files; the next read opens them again."""
        self._opened, self._process = {}, 0

    def __enter__(self) -> LmdbPairs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _environment(self, name: str) -> lmdb.Environment:
        if os.getpid() != self._process:
            self._open()
        return self._opened[name]

    def _get(self, name: str, key: str) -> bytes | None:
        with self._environment(name).begin() as transaction:
            return transaction.get(key.encode())

    def __getstate__(self) -> dict[str, object]:
        return {"split_dir": self.split_dir}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["split_dir"])  # type: ignore[misc]

    @cached_property
    def num_pairs(self) -> int:
        return self._count("pairs", "num_samples")

    @cached_property
    def num_images(self) -> int:
        return self._count("imgs", "num_images")

    def _count(self, name: str, key: str) -> int:
        value = self._get(name, key)
        if value is None or not value.isdigit():
            raise InvalidInput(f"{self.split_dir / name}: {key} is missing or no number; was its packing cut off?")
        return int(value)

    def pair(self, index: int) -> Pair:
        """Pair `index` of 0..num_pairs-1."""
        where = f"{self.split_dir / 'pairs'}: key {index}"
        value = self._get("pairs", str(index))
        if value is None:
            raise InvalidInput(f"{where} is missing of {self.num_pairs}")
        return load_pair(value, where)

    def pairs(self) -> Iterator[Pair]:
        """Every pair, in order."""
        return map(self.pair, range(self.num_pairs))

    @cached_property
    def image_ids(self) -> list[int]:
        with self._environment("imgs").begin() as transaction:
            keys = [key for key in transaction.cursor().iternext(values=False) if key != b"num_images"]
        path = self.split_dir / "imgs"
        if len(keys) != self.num_images:
            raise InvalidInput(f"{path}: {len(keys)} pictures, num_images says {self.num_images}")
        return sorted(parse_image_id(key, f"{path}: key {key!r}") for key in keys)

    @cached_property
    def texts(self) -> list[TextRecord]:
        texts: dict[int, tuple[str, list[int]]] = {}
        for image_id, text_id, text in self.pairs():
            texts.setdefault(text_id, (text, []))[1].append(image_id)
        return [TextRecord(text_id, text, tuple(image_ids)) for text_id, (text, image_ids) in texts.items()]

    def image_bytes(self, image_id: int) -> bytes:
        """The encoded picture file."""
        where = f"{self.split_dir / 'imgs'}: picture {image_id}"
        value = self._get("imgs", str(image_id))
        if value is None:
            raise InvalidInput(f"{where} is missing")
        return decode_base64(value, where)
