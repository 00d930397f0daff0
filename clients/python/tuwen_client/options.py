"""What can be chosen about a client, checked once: frozen, so that threads and calls may share it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuwen_client.errors import InvalidInput

Priority = Literal["interactive", "bulk"]
Compression = Literal["gzip"]

# Triton's numbers: a request of level 1 leaves a queue before every one of level 2.
_PRIORITY_LEVELS = {"interactive": 1, "bulk": 2}

_HEADER_NAME = re.compile(r"[a-z0-9_.-]+")

TOKEN_VARIABLE = "TUWEN_ADMIN_TOKEN"  # noqa: S105, a name


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and how soon, an item is sent again that met a server which is gone or full.

    Embedding changes nothing in the server, so an item may be sent twice; its answer is taken once. What is wrong with
    an item, a model or a deadline is never tried again. Delays are drawn evenly from 0 to first_delay_s, then to twice
    that, and so on up to max_delay_s: clients that failed together do not come back together. No delay goes past the
    item's deadline.

    Attributes:
        attempts: most times an item is sent, the first included; 1 turns retries off.
    """

    attempts: int = 4
    first_delay_s: float = 0.1
    max_delay_s: float = 2.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidInput(f"attempts is {self.attempts}, expected at least 1")
        if not 0 <= self.first_delay_s <= self.max_delay_s:
            raise InvalidInput(
                f"first_delay_s is {self.first_delay_s}, expected 0 to max_delay_s, which is {self.max_delay_s}"
            )

    @classmethod
    def off(cls) -> RetryPolicy:
        """Every failure is told at once."""
        return cls(attempts=1)

    def delay_s(self, failures: int, chance: float) -> float:
        """Seconds to wait after that many failures in a row.

        Args:
            chance: a random number from 0 to 1.
        """
        # The exponent is bounded because a float is: an endpoint may fail for days.
        return chance * min(self.max_delay_s, self.first_delay_s * 2.0 ** min(failures - 1, 30))


@dataclass(frozen=True)
class Tls:
    """PEM files for an encrypted connection.

    Attributes:
        ca_path: the authority that signed the server's certificate; None trusts those that gRPC brings.
        cert_path: this client's own certificate, for servers that ask for one; with its key_path.
    """

    ca_path: Path | str | None = None
    cert_path: Path | str | None = None
    key_path: Path | str | None = None

    def __post_init__(self) -> None:
        if (self.cert_path is None) != (self.key_path is None):
            raise InvalidInput("cert_path and key_path go together")

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """Contents of authority, key and certificate, as gRPC takes them.

        Raises:
            InvalidInput: a file cannot be read.
        """
        return _read(self.ca_path), _read(self.key_path), _read(self.cert_path)


@dataclass(frozen=True)
class ClientOptions:
    """Everything that `Client` and `AsyncClient` are made with, which describes each field."""

    urls: tuple[str, ...]
    model: str | None
    timeout_s: float
    max_in_flight: int
    retry: RetryPolicy
    priority: Priority
    tls: Tls | None
    token: str | None
    headers: tuple[tuple[str, str], ...]
    compression: Compression | None
    shared_memory: bool

    def __post_init__(self) -> None:
        if not self.urls:
            raise InvalidInput("url is empty, expected host:port")
        if self.max_in_flight < 1:
            raise InvalidInput(f"max_in_flight is {self.max_in_flight}, expected at least 1")
        if self.compression not in (None, "gzip"):
            raise InvalidInput(f"compression is {self.compression!r}, expected 'gzip' or None")
        check_timeout(self.timeout_s)
        priority_level(self.priority)


def check_timeout(timeout_s: float) -> float:
    """The timeout itself; raises InvalidInput where no time is left."""
    if not timeout_s > 0:
        raise InvalidInput(f"timeout_s is {timeout_s}, expected more than 0")
    return timeout_s


def priority_level(priority: Priority) -> int:
    """Triton's number of a priority; raises InvalidInput for others."""
    if priority not in _PRIORITY_LEVELS:
        raise InvalidInput(f"priority is {priority!r}, expected {' or '.join(map(repr, _PRIORITY_LEVELS))}")
    return _PRIORITY_LEVELS[priority]


def split_urls(url: str | Sequence[str]) -> tuple[str, ...]:
    """Endpoints of "host:port", "host:port,host:port" or a list of them; one named twice counts once."""
    parts = url.split(",") if isinstance(url, str) else url
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def header_pairs(headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    """gRPC metadata, which wants lower case.

    Raises:
        InvalidInput: a header has characters that none may have.
    """
    pairs = tuple((name.lower(), value) for name, value in (headers or {}).items())
    for name, value in pairs:
        if not _HEADER_NAME.fullmatch(name) or not (value.isascii() and value.isprintable()):
            raise InvalidInput(f"header {name!r}: expected letters, digits and -_. and a value of plain ASCII")
    return pairs


def default_token(token: str | None) -> str | None:
    """The token given, else the one in the environment.

    Raises:
        InvalidInput: it is no token; the sentence does not show it.
    """
    found = token if token is not None else os.environ.get(TOKEN_VARIABLE, "").strip()
    if not (found.isascii() and found.isprintable()):
        raise InvalidInput("token: expected plain ASCII")
    return found or None


def _read(path: Path | str | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from error
