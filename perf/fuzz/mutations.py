"""Damage to picture files: anywhere, and where each format keeps its sizes, so that decoders are reached.

    mutate_picture(rng, "PNG", encoded, other) -> bytes

Deterministic for a given `random.Random`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from random import Random

_EDGE_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)
_PNG_SIGNATURE_SIZE = 8
_RIFF_HEADER_SIZE = 12
# 7900 x 8100 is just inside the limit of pixels: what a decoder must then bear. Rare, as each costs a second.
_SIDES = (0, 1, 2, 3, 7, 17, 255, 256, 1000, 16383, 16384, 32768, 65535)
_LARGE_SIDES = (7900, 8100)
_LARGE_IN = 40
_PNG_SIDES = (*_SIDES, 65536, 64_000_000, 2**31 - 1, 2**32 - 1)


def mutate_picture(rng: Random, format: str, encoded: bytes, other: bytes) -> bytes:
    """One to four mutations of a file; `other` is a second file to splice with."""
    data = encoded
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        structural = _STRUCTURAL.get(format, _edit_header)
        change = structural if rng.random() < 0.5 else rng.choice(_GENERIC)
        data = splice(rng, data, other) if rng.random() < 0.04 else change(rng, data)
    return data


def flip_bits(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_run(rng: Random, data: bytes) -> bytes:
    start, end = _range(rng, len(data), 16)
    return data[:start] + bytes([rng.choice(_EDGE_BYTES)]) * (end - start) + data[end:]


def truncate(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def delete_range(rng: Random, data: bytes) -> bytes:
    start, end = _range(rng, len(data), 64)
    return data[:start] + data[end:]


def repeat_range(rng: Random, data: bytes) -> bytes:
    start, end = _range(rng, len(data), 200)
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 50)) + data[end:]


def insert_noise(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 32)) + data[at:]


def splice(rng: Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _range(rng: Random, size: int, longest: int) -> tuple[int, int]:
    start = rng.randrange(size + 1)
    return start, min(size, start + rng.randint(1, longest))


def _side(rng: Random) -> int:
    return rng.choice(_LARGE_SIDES if rng.randrange(_LARGE_IN) == 0 else _SIDES)


def _edit_header(rng: Random, data: bytes) -> bytes:
    """A 16- or 32-bit number in the first 64 bytes becomes an interesting one: GIF, BMP, TIFF and PPM."""
    layout = rng.choice(("<H", ">H", "<I", ">I"))
    size = struct.calcsize(layout)
    at = rng.randrange(max(1, min(len(data), 64) - size))
    return data[:at] + struct.pack(layout, _side(rng)) + data[at + size :]


def _mutate_jpeg(rng: Random, data: bytes) -> bytes:
    segments = _jpeg_segments(data)
    if not segments:
        return flip_bits(rng, data)
    start, end = rng.choice(segments)
    frame = next(((low, high) for low, high in segments if data[low + 1] in (0xC0, 0xC1, 0xC2)), None)
    match rng.randrange(6):
        case 0 if frame:  # height and width stand behind marker, length and precision
            at = frame[0] + rng.choice((5, 7))
            return data[:at] + struct.pack(">H", _side(rng)) + data[at + 2 :]
        case 1 if frame:  # precision, number of components, a component's id, sampling or table
            at = min(frame[0] + rng.choice((4, 9, 10, 11, 12, 13, 14, 15)), len(data) - 1)
            return data[:at] + bytes([rng.choice((0, 1, 2, 3, 4, 8, 12, 0x11, 0x22, 0x44, 0xFF))]) + data[at + 1 :]
        case 2:
            return (
                data[: start + 2] + struct.pack(">H", rng.choice((0, 1, 2, 3, 0xFFFF, end - start))) + data[start + 4 :]
            )
        case 3:
            return data[:start] + data[end:]
        case 4:
            return data[:end] + data[start:end] * rng.choice((1, 2, 60)) + data[end:]
        case _:
            return data[:start] + flip_bits(rng, data[start:end]) + data[end:]


def _jpeg_segments(data: bytes) -> list[tuple[int, int]]:
    """Start and end of each marker segment, entropy-coded data left out."""
    segments, at = [], 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:
            at += 1 if marker == 0xFF else 2
            continue
        end = min(len(data), at + 2 + max(2, struct.unpack(">H", data[at + 2 : at + 4])[0]))
        segments.append((at, end))
        at = end
    return segments


def _mutate_png(rng: Random, data: bytes) -> bytes:
    """Checksums are made right again, so that the change reaches the decoder."""
    chunks = _png_chunks(data)
    if not chunks:
        return flip_bits(rng, data)
    at = rng.randrange(len(chunks))
    kind, body = chunks[at]
    match rng.randrange(7):
        case 0 if chunks[0][0] == b"IHDR":
            offset = rng.choice((0, 4))
            kind, body = chunks[0]
            side = rng.choice((_side(rng), rng.choice(_PNG_SIDES)))
            chunks[0] = (kind, body[:offset] + struct.pack(">I", side) + body[offset + 4 :])
        case 1 if len(chunks[0][1]) == 13:  # bit depth, colour type, compression, filter, interlace
            kind, body = chunks[0]
            field = rng.randrange(8, 13)
            chunks[0] = (kind, body[:field] + bytes([rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))]) + body[field + 1 :])
        case 2:
            chunks[at] = (kind, flip_bits(rng, body))
        case 3:
            del chunks[at]
        case 4:
            chunks[at:at] = [(kind, body)] * rng.choice((1, 2, 30))
        case 5:
            kinds = (b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"fcTL", b"acTL", b"fdAT", b"gAMA", b"cHRM", b"eXIf", b"pHYs")
            chunks.insert(rng.randrange(len(chunks) + 1), (rng.choice(kinds), rng.randbytes(rng.randrange(40))))
        case _:
            return data[:_PNG_SIGNATURE_SIZE] + _join_png(_damage_rows(rng, chunks))
    return data[:_PNG_SIGNATURE_SIZE] + _join_png(chunks)


def _damage_rows(rng: Random, chunks: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The rows below the compression: their filter bytes, their number."""
    packed = b"".join(body for kind, body in chunks if kind == b"IDAT")
    try:
        rows = zlib.decompress(packed)
    except zlib.error:
        return chunks
    rows = rng.choice((flip_bits, truncate, set_run, repeat_range))(rng, rows)
    kept = [chunk for chunk in chunks if chunk[0] not in (b"IDAT", b"IEND")]
    return [*kept, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], _PNG_SIGNATURE_SIZE
    while at + 12 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def _join_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _mutate_webp(rng: Random, data: bytes) -> bytes:
    chunks = _riff_chunks(data)
    if not chunks:
        return flip_bits(rng, data)
    start, end = rng.choice(chunks)
    match rng.randrange(6):
        case 0:  # the chunk's length
            lie = rng.choice((0, 1, end - start, 2**31 - 1, 2**32 - 1))
            return data[: start + 4] + struct.pack("<I", lie) + data[start + 8 :]
        case 1:  # the first bytes of a chunk hold its sizes: VP8, VP8L, VP8X, ANMF
            at = min(start + 8 + rng.randrange(16), len(data))
            return data[:at] + struct.pack("<H", _side(rng)) + data[at + 2 :]
        case 2:
            return _fix_riff(data[:start] + data[end:])
        case 3:
            return _fix_riff(data[:end] + data[start:end] * rng.choice((1, 2, 30)) + data[end:])
        case 4:
            return data[: start + 8] + flip_bits(rng, data[start + 8 : end]) + data[end:]
        case _:
            return _fix_riff(truncate(rng, data))


def _riff_chunks(data: bytes) -> list[tuple[int, int]]:
    chunks, at = [], _RIFF_HEADER_SIZE
    while at + 8 <= len(data):
        size = struct.unpack("<I", data[at + 4 : at + 8])[0]
        end = min(len(data), at + 8 + size + size % 2)
        chunks.append((at, end))
        at = end
    return chunks


def _fix_riff(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:] if len(data) >= _RIFF_HEADER_SIZE else data


Mutation = Callable[[Random, bytes], bytes]
_GENERIC: tuple[Mutation, ...] = (flip_bits, set_run, truncate, delete_range, repeat_range, insert_noise)
_STRUCTURAL: dict[str, Mutation] = {"JPEG": _mutate_jpeg, "PNG": _mutate_png, "WEBP": _mutate_webp}
