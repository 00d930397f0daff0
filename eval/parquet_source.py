"""A Parquet list as an input: a column `image` of paths or picture files, or `text`, and maybe `id`.

Without `id` a picture goes by its path, anything else by its row, counted from 0 through all files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.engine import Unusable
from eval.feature_files import arrow
from eval.feature_sources import Id, Payload, Side, file_digest, read_picture
from tuwen.errors import InvalidInput

_COLUMNS: dict[Side, str] = {"images": "image", "texts": "text"}
_BATCH_ROWS = 64  # of whole picture files, which lie in memory at once


def columns_of(files: Sequence[Path]) -> set[Side]:
    """The sides that a list has a column of."""
    names = _open(files[0]).schema_arrow.names
    return {side for side, column in _COLUMNS.items() if column in names}


class ParquetColumn:
    """One side of a Parquet list; paths of pictures are relative to the file that names them."""

    def __init__(self, files: Sequence[Path], side: Side) -> None:
        self._files, self._side, self._column = tuple(files), side, _COLUMNS[side]
        self.description = str(files[0]) if len(files) == 1 else f"{files[0].parent}/*.parquet"
        self.digest = file_digest("parquet", ((path.name, path) for path in files))
        opened = [_open(path) for path in files]
        kinds = {self._kinds(path, one.schema_arrow) for path, one in zip(files, opened, strict=True)}
        if len(kinds) > 1:
            raise InvalidInput(f"{self.description}: the files' columns differ in type")
        self._is_path, self._has_ids, self.has_integer_ids = kinds.pop()
        self._counts = [one.metadata.num_rows for one in opened]

    def _kinds(self, path: Path, schema: Any) -> tuple[bool, bool, bool]:
        """Whether the column holds paths, whether there are ids, and whether those are integers."""
        types = arrow().types
        if self._column not in schema.names:
            raise InvalidInput(f"{path}: no column {self._column!r}, it has {', '.join(schema.names)}")
        value = schema.field(self._column).type
        is_string = types.is_string(value) or types.is_large_string(value)
        is_binary = types.is_binary(value) or types.is_large_binary(value)
        if not (is_string or (is_binary and self._side == "images")):
            expected = "paths or picture files" if self._side == "images" else "strings"
            raise InvalidInput(f"{path}: column {self._column!r} is {value}, expected {expected}")
        is_path = is_string and self._side == "images"
        if "id" not in schema.names:
            return is_path, False, not is_path
        kind = schema.field("id").type
        if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
            raise InvalidInput(f"{path}: column 'id' is {kind}, expected integers or strings")
        return is_path, True, types.is_integer(kind)

    def __len__(self) -> int:
        return sum(self._counts)

    def read(self, start: int, stop: int) -> Iterator[tuple[Id, Payload | Unusable]]:
        """As `Source`."""
        first = 0
        for path, count in zip(self._files, self._counts, strict=True):
            if first < stop and start < first + count:
                yield from self._read_file(path, first, max(start - first, 0), min(stop - first, count))
            first += count

    def _read_file(self, path: Path, first: int, start: int, stop: int) -> Iterator[tuple[Id, Payload | Unusable]]:
        """Rows start..stop-1 of one file, whose own first row is `first` of all."""
        columns = [self._column, *(["id"] if self._has_ids else [])]
        for row, values in _rows(path, columns, start, stop):
            value = values[0]
            own_id = values[1] if self._has_ids else value if self._is_path else first + row
            item_id = (first + row if self.has_integer_ids else str(first + row)) if own_id is None else own_id
            if value is None or own_id is None:
                yield item_id, Unusable(f"{path}: row {row} has no {'id' if value is not None else self._column}")
            else:
                yield item_id, read_picture(path.parent / value) if self._is_path else value


def _rows(path: Path, columns: list[str], start: int, stop: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(row, values) of rows start..stop-1, read from the row groups that hold them, a few rows at a time."""
    file = _open(path)
    groups: list[int] = []
    row = first = 0
    for group in range(file.num_row_groups):
        end = row + file.metadata.row_group(group).num_rows
        if row < stop and start < end:
            first = first if groups else row
            groups.append(group)
        row = end
    row = first
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns):
        low, high = max(start - row, 0), min(stop - row, batch.num_rows)
        if low < high:
            chosen = batch.slice(low, high - low)
            values = zip(*(chosen.column(column).to_pylist() for column in columns), strict=True)
            yield from zip(range(row + low, row + high), values, strict=True)
        row += batch.num_rows
        if row >= stop:
            return


def _open(path: Path) -> Any:
    pa = arrow()
    try:
        return pa.parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise InvalidInput(f"{path}: not a Parquet file that can be read: {error}") from None
