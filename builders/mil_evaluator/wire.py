"""Protobuf's wire format, read without descriptors: a message is its fields by number.

Source: protobuf.dev/programming-guides/encoding. A `.mlmodel` of a package is one such message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from builders.mil_evaluator.errors import UnusablePackage

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# 64 bits in groups of seven.
_MAX_VARINT_BYTES = 10

Field = int | memoryview


@dataclass(frozen=True)
class Message:
    """The fields of one message: number -> values in order. Numbers of fixed width stay bytes, as their type is not
    told by the wire."""

    fields: dict[int, list[Field]] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: memoryview) -> Message:
        """
        Raises:
            UnusablePackage: no message.
        """
        message = cls()
        for number, value in _read_fields(data):
            message.fields.setdefault(number, []).append(value)
        return message

    def has(self, number: int) -> bool:
        return number in self.fields

    def integer(self, number: int) -> int:
        """A varint read as int64; 0 where the field is absent, as protobuf has it."""
        value = self.fields.get(number, [0])[-1]
        if not isinstance(value, int):
            raise UnusablePackage(f"the model is damaged: field {number} is no integer")
        return value - (1 << 64) if value >= 1 << 63 else value

    def raw(self, number: int) -> memoryview:
        value = self.fields.get(number, [memoryview(b"")])[-1]
        return self._as_bytes(number, value)

    def text(self, number: int) -> str:
        return _decode(self.raw(number))

    def texts(self, number: int) -> list[str]:
        return [_decode(self._as_bytes(number, value)) for value in self.fields.get(number, [])]

    def message(self, number: int) -> Message:
        return Message.parse(self.raw(number))

    def messages(self, number: int) -> list[Message]:
        return [Message.parse(self._as_bytes(number, value)) for value in self.fields.get(number, [])]

    def map(self, number: int) -> dict[str, Message]:
        """A map<string, message>: an entry is a message of key, 1, and value, 2."""
        return {entry.text(1): entry.message(2) for entry in self.messages(number)}

    def packed_integers(self, number: int) -> list[int]:
        """A repeated int32, int64 or bool, packed or not."""
        values: list[int] = []
        for value in self.fields.get(number, []):
            if isinstance(value, int):
                values.append(value)
                continue
            position = 0
            while position < len(value):
                one, position = _read_varint(value, position)
                values.append(one)
        return [value - (1 << 64) if value >= 1 << 63 else value for value in values]

    def packed_bytes(self, number: int) -> bytes:
        """A repeated float or double, as it lies in memory."""
        return b"".join(self._as_bytes(number, value) for value in self.fields.get(number, []))

    def _as_bytes(self, number: int, value: Field) -> memoryview:
        if isinstance(value, int):
            raise UnusablePackage(f"the model is damaged: field {number} is an integer, expected bytes")
        return value


def _read_fields(data: memoryview) -> Iterator[tuple[int, Field]]:
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _read_varint(data, position)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, position = _read_varint(data, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise UnusablePackage(f"the model is damaged: unknown wire type {kind}")
        if position + size > len(data):
            raise UnusablePackage("the model is damaged: it ends within a field")
        yield tag >> 3, data[position : position + size]
        position += size


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """The integer at `position`, and where it ends."""
    value = 0
    for index, byte in enumerate(data[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + index + 1
    raise UnusablePackage("the model is damaged: it ends within a number")


def _decode(data: memoryview) -> str:
    try:
        return bytes(data).decode()
    except UnicodeDecodeError:
        raise UnusablePackage("the model is damaged: a name is not UTF-8") from None


def little_endian(data: memoryview, format: str) -> tuple[int, ...]:
    """Numbers of fixed layout; `format` as struct's, without the byte order."""
    return struct.unpack(f"<{format}", data)
