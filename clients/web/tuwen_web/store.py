"""Vectors kept on disk, so that a restart embeds only what is new: one .npz for each gallery, without pickles."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from tuwen_client.search import Picture

from tuwen_web.gallery import Rows

log = logging.getLogger(__name__)

_KEY_BYTES = 16


def picture_key(picture: Picture) -> bytes:
    """What its vector is kept under: a digest of the bytes; of path, size and time of change for a file."""
    if isinstance(picture.source, bytes):
        return _key_of_bytes(picture.source)
    path = picture.source.absolute()
    try:
        status = path.stat()
    except OSError:  # gone since the folder was listed; embedding it will say so
        return _digest(b"lost", os.fsencode(path))
    return _digest(b"file", f"{status.st_size} {status.st_mtime_ns} ".encode() + os.fsencode(path))


@cache
def _key_of_bytes(content: bytes) -> bytes:
    """Asked for with every result; the bytes themselves are kept all the time anyway."""
    return _digest(b"image", content)


def text_key(text: str) -> bytes:
    """What a text's vector is kept under."""
    return _digest(b"text", text.encode("utf-8", "surrogatepass"))


class VectorStore:
    """A file of vectors by key, all of one model."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, fingerprint: int) -> dict[bytes, Rows]:
        """float32 (D,) by key; nothing where there is no file, or its vectors are another model's."""
        try:
            with np.load(self.path, allow_pickle=False) as stored:
                if int(stored["fingerprint"]) != fingerprint:
                    return {}
                keys, vectors = stored["keys"], stored["vectors"]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            log.warning("%s: cannot be read, all is embedded again: %s", self.path, error)
            return {}
        is_sound = keys.shape == (len(vectors), _KEY_BYTES) and vectors.ndim == 2 and np.isfinite(vectors).all()
        if keys.dtype != np.uint8 or vectors.dtype != np.float32 or not is_sound:
            log.warning("%s: not a file of vectors, all is embedded again", self.path)
            return {}
        return {key.tobytes(): vector for key, vector in zip(keys, vectors, strict=True)}

    def save(self, fingerprint: int, vectors: Mapping[bytes, Rows]) -> None:
        """Replace the file, in one step; a folder that cannot be written costs a warning, and the next start time."""
        if not vectors:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        keys = np.frombuffer(b"".join(vectors), np.uint8).reshape(len(vectors), _KEY_BYTES)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    np.savez(file, fingerprint=fingerprint, keys=keys, vectors=np.stack([*vectors.values()]))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: vectors cannot be kept: %s", self.path, error.strerror)


def _digest(kind: bytes, content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_KEY_BYTES, person=kind).digest()
