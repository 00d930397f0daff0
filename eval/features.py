"""Embeddings of a whole input, to disk, in parts: a kill at any moment loses one part's work and nothing else.

    tuwen features --checkpoint samples/emoji_tiny --data samples/emoji_cn --out features

A part covers a fixed range of the input's order and is embedded on its own, so that its bytes do not depend on where an
earlier run ended. `eval/feature_files.py` has the format.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eval.engine import Engine, EngineKind, Row, Unusable
from eval.engines import DEFAULT_REPOSITORY, DEFAULT_URL, open_engine
from eval.feature_files import (
    MANIFEST_NAME,
    Dtype,
    Manifest,
    Skipped,
    part_bytes,
    part_path,
    read_manifest,
    skipped_of,
    write_jsonl,
    write_manifest,
    write_part,
    write_single_file,
    write_skipped,
)
from eval.feature_sources import Id, Side, Source, open_source, sides_of
from tuwen.errors import InvalidInput

if TYPE_CHECKING:
    from tuwen_client import Tls

log = logging.getLogger(__name__)

PART_ROWS = 4096  # 4 MB of 512 numbers in float16; a batch's wait at each part's end is then some 1% of its time
# Items read before the engine asks for them, so that it does not wait for a disk or a network.
_READ_AHEAD = 64
_LOGGED_SKIPS = 20

Item = TypeVar("Item")
ProgressHook = Callable[[int, int, str], None]


@dataclass(frozen=True)
class EngineChoice:
    """What to embed with, as words that another process can open it by; see `eval.engines.open_engine`."""

    kind: EngineKind
    checkpoint: Path | None = None
    device: str = "cpu"
    batch_size: int | None = None
    repository: Path = DEFAULT_REPOSITORY
    model: str | None = None
    version: int | None = None
    url: str = DEFAULT_URL
    tls: Tls | None = None

    def open(self) -> Engine:
        """The engine, ready to embed."""
        return open_engine(
            self.kind,
            checkpoint=self.checkpoint,
            device=self.device,
            batch_size=self.batch_size,
            repository=self.repository,
            model=self.model,
            version=self.version,
            url=self.url,
            tls=self.tls,
        )


@dataclass(frozen=True)
class Extraction:
    """What was done for one side.

    Attributes:
        num_resumed: items whose parts were there already.
        files: single file and JSONL, where asked for.
    """

    side: Side
    folder: Path
    num_items: int
    num_embedded: int
    num_skipped: int
    num_resumed: int
    files: tuple[Path, ...]


ItemsHook = Callable[[int], None]
# Embeds parts by number, in any order: yields (number, its file's content). The hook hears how many items of the part
# under way are done, where there is one.
EmbedParts = Callable[[Source, Manifest, list[int], ItemsHook], Iterator[tuple[int, bytes]]]


@dataclass(frozen=True)
class FeatureJob:
    """What to make features of, and how.

    Attributes:
        sides: none means all that the input has.
        part_rows: items to a part, the most work that a kill loses.
        single_file, jsonl: what else to write of each side, once it is complete.
    """

    data: Path
    out: Path
    split: str = "valid"
    sides: tuple[Side, ...] = ()
    dtype: Dtype = "float16"
    part_rows: int = PART_ROWS
    single_file: bool = False
    jsonl: bool = False


def write_features(
    job: FeatureJob,
    engine: Engine,
    engine_name: str,
    embed_parts: EmbedParts,
    on_progress: ProgressHook = lambda done, total, what: None,
) -> list[Extraction]:
    """Write each side to `OUT/images` or `OUT/texts`; a second call goes on where one ended.

    Args:
        engine: says which model it is.
        engine_name: torch, onnx, triton or ray.
        embed_parts: `parts_by_engine(engine)`, or Ray's.
    Raises:
        InvalidInput: the input cannot be read, or a folder holds features of another input, model or option.
    """
    done = []
    for side in job.sides or sides_of(job.data):
        source = open_source(job.data, job.split, side)
        manifest = _describe(job, source, side, engine, engine_name)
        done.append(_extract(job, source, manifest, embed_parts, on_progress))
    return done


def _describe(job: FeatureJob, source: Source, side: Side, engine: Engine, engine_name: str) -> Manifest:
    if not len(source):
        raise InvalidInput(f"{source.description}: has no {side}")
    return Manifest(
        side=side,
        input=source.description,
        input_digest=source.digest,
        num_items=len(source),
        engine=engine_name,
        model=engine.model_name,
        fingerprint=engine.fingerprint,
        embed_dim=engine.embed_dim,
        dtype=job.dtype,
        has_integer_ids=source.has_integer_ids,
        part_rows=job.part_rows,
    )


def _extract(
    job: FeatureJob, source: Source, manifest: Manifest, embed_parts: EmbedParts, on_progress: ProgressHook
) -> Extraction:
    """Write the parts that are not there yet, then what is made of them all."""
    folder = job.out / manifest.side
    _begin(folder, manifest)
    missing = [number for number in range(manifest.num_parts) if not part_path(folder, number).is_file()]
    num_resumed = done = manifest.num_items - sum(map(manifest.num_items_of, missing))

    def report(num_of_part: int) -> None:
        on_progress(done + num_of_part, manifest.num_items, manifest.side)

    report(0)
    skips = _SkipLog()
    for number, content in embed_parts(source, manifest, missing, report):
        write_part(folder, number, content)
        skips.add(skipped_of(part_path(folder, number)))
        done += manifest.num_items_of(number)
        report(0)
    skips.close()
    num_skipped = len(write_skipped(folder, manifest))
    files = [write for write, asked in ((write_single_file, job.single_file), (write_jsonl, job.jsonl)) if asked]
    written = tuple(write(folder, manifest) for write in files)
    _sweep(folder)
    num_embedded = manifest.num_items - num_skipped
    return Extraction(manifest.side, folder, manifest.num_items, num_embedded, num_skipped, num_resumed, written)


class _SkipLog:
    """The first of the skipped items in the log, and how many more there are."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, some: Iterable[Skipped]) -> None:
        for skipped in some:
            if self._count < _LOGGED_SKIPS:
                log.warning("skipped %s: %s", skipped.id, skipped.reason)
            self._count += 1

    def close(self) -> None:
        if self._count > _LOGGED_SKIPS:
            log.warning("skipped %d more; skipped.jsonl lists them all", self._count - _LOGGED_SKIPS)


def _begin(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, or see that the one that is there says the same.

    Raises:
        InvalidInput: it does not, and the sentence says what has changed; or there are parts of nobody knows what.
    """
    way_out = "remove it, or name another --out"
    if not (folder / MANIFEST_NAME).is_file():
        if found := next(folder.glob("*.parquet"), None):  # a manifest is written before any part
            raise InvalidInput(f"{folder}: holds {found.name} and no {MANIFEST_NAME}; {way_out}")
        write_manifest(folder, manifest)
        return
    before = read_manifest(folder)
    if (before.input_digest, before.num_items) != (manifest.input_digest, manifest.num_items):
        raise InvalidInput(
            f"{folder}: its input has changed since it was begun ({before.num_items} {before.side} in {before.input}, "
            f"now {manifest.num_items} in {manifest.input}); {way_out}"
        )
    if before.fingerprint != manifest.fingerprint:
        raise InvalidInput(
            f"{folder}: was begun with model {before.model} of fingerprint {before.fingerprint}, "
            f"this is {manifest.model} of {manifest.fingerprint}; {way_out}"
        )
    for option, was, now in (
        ("engine", before.engine, manifest.engine),
        ("dtype", before.dtype, manifest.dtype),
        ("part-rows", before.part_rows, manifest.part_rows),
    ):
        if was != now:
            raise InvalidInput(f"{folder}: was begun with --{option} {was}, now {now}; give the same, or {way_out}")


def _sweep(folder: Path) -> None:
    """Remove what a killed run left under temporary names."""
    leftovers = (*folder.glob(".*.parquet.*"), *folder.glob(".*.json*.*"), *folder.parent.glob(f".{folder.name}.*"))
    for path in leftovers:
        path.unlink(missing_ok=True)


# --- embedding a part ---------------------------------------------------------------------------------------


def parts_by_engine(engine: Engine) -> EmbedParts:
    """Parts in turn, by an engine in this process."""

    def embed_parts(
        source: Source, manifest: Manifest, numbers: list[int], on_items: ItemsHook
    ) -> Iterator[tuple[int, bytes]]:
        for number in numbers:
            yield number, embed_part(engine, source, manifest, number, on_items)

    return embed_parts


def embed_part(
    engine: Engine,
    source: Source,
    manifest: Manifest,
    number: int,
    on_items: ItemsHook = lambda done: None,
) -> bytes:
    """The content of one part's file: embeddings of its items, and which were skipped."""
    start = number * manifest.part_rows
    items: list[tuple[Id, Unusable | None]] = []

    def readable() -> Iterator[Any]:
        for item_id, payload in read_ahead(source.read(start, start + manifest.num_items_of(number))):
            unusable = payload if isinstance(payload, Unusable) else None
            items.append((item_id, unusable))
            if unusable is None:
                yield payload

    embed: Callable[[Iterable[Any]], Iterator[Row | Unusable]]
    embed = engine.embed_images if manifest.side == "images" else engine.embed_texts
    answers: deque[Row | Unusable] = deque()
    for answer in embed(readable()):
        answers.append(answer)
        on_items(len(answers))
    ids: list[Id] = []
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for item_id, unusable in items:
        outcome = answers.popleft() if unusable is None else unusable
        if isinstance(outcome, Unusable):
            skipped.append(Skipped(item_id, str(outcome)))
        else:
            ids.append(item_id)
            rows.append(outcome)
    return part_bytes(manifest, ids, rows, skipped)


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, read by a thread of its own, up to `_READ_AHEAD` before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        reading = deque(pool.submit(next, items, None) for _ in range(_READ_AHEAD))
        while (item := reading.popleft().result()) is not None:
            reading.append(pool.submit(next, items, None))
            yield item
