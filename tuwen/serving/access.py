"""Who may do what: TLS for gRPC, and a token for the protocols that change or spy on a running server.

files and a token -> Triton's arguments. Inference, health, metadata, model configs and statistics stay open.
"""

import os
import secrets
import ssl
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuwen.errors import InvalidInput

TOKEN_VARIABLE = "TUWEN_ADMIN_TOKEN"  # noqa: S105, a name
TOKEN_KEY = "tuwen-admin-token"  # noqa: S105, a name
# Triton reads `--grpc-restricted-protocol=...:KEY=VALUE` from the gRPC header of this name; HTTP's is KEY itself.
GRPC_TOKEN_HEADER = f"triton-grpc-protocol-{TOKEN_KEY}"
HTTP_TOKEN_HEADER = TOKEN_KEY
# Loading and unloading, trace files, log files, and memory that clients name: none of them is part of embedding.
# "model-repository" covers the index of models as well (measured with 2.51), which thus needs the token too.
RESTRICTED_PROTOCOLS = ("model-repository", "trace", "logging", "shared-memory")
_MIN_TOKEN_LENGTH = 16
# What passes unchanged through a header, and through Triton's own splitting at ":", "=" and ",".
_TOKEN_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_.~+/")


@dataclass(frozen=True)
class Tls:
    """PEM files of the gRPC endpoint; with `client_ca_path` only clients with a certificate of that authority enter."""

    cert_path: Path
    key_path: Path
    client_ca_path: Path | None = None

    def check(self) -> None:
        """Read the files as a server would; Triton would say no more than that it cannot listen.

        Raises:
            InvalidInput: a file is missing or is no PEM, or the key is another certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # An empty password: a key that wants one is refused, where OpenSSL would ask the terminal.
        _check(f"{self.cert_path} with {self.key_path}", context.load_cert_chain, self.cert_path, self.key_path, "")
        if self.client_ca_path is not None:
            _check(f"{self.client_ca_path}", context.load_verify_locations, self.client_ca_path)

    def arguments(self) -> list[str]:
        # Mutual TLS preempts plain TLS in Triton, so exactly one of the two is asked for.
        files = [f"--grpc-server-cert={self.cert_path.absolute()}", f"--grpc-server-key={self.key_path.absolute()}"]
        if self.client_ca_path is None:
            return ["--grpc-use-ssl=true", *files]
        return ["--grpc-use-ssl-mutual=true", *files, f"--grpc-root-cert={self.client_ca_path.absolute()}"]


def make_tls(cert: Path | None, key: Path | None, client_ca: Path | None) -> Tls | None:
    """None when no file is given.

    Raises:
        InvalidInput: only some of the files that belong together are given.
    """
    if cert is not None and key is not None:
        return Tls(cert, key, client_ca)
    if (cert, key, client_ca) == (None, None, None):
        return None
    raise InvalidInput("--tls-cert and --tls-key go together, and --tls-client-ca needs both")


def new_token() -> str:
    """A token that nobody knows."""
    return secrets.token_urlsafe(32)


def read_token(path: Path | None) -> str | None:
    """The token in this file, else the one in TUWEN_ADMIN_TOKEN; None when neither is given.

    Raises:
        InvalidInput: the file cannot be read or others may read it, or the token is too short or has other characters.
    """
    if path is None:
        token = os.environ.get(TOKEN_VARIABLE)
        return None if token is None else check_token(token.strip(), TOKEN_VARIABLE)
    try:
        token, mode = path.read_text(encoding="utf-8").strip(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot read the admin token: {error}") from error
    if mode & 0o077:
        raise InvalidInput(f"{path}: others may read this token (mode {mode & 0o777:o}); run `chmod 600 {path}`")
    return check_token(token, str(path))


def check_token(token: str, source: str) -> str:
    """The token itself; it is never part of the error."""
    if len(token) < _MIN_TOKEN_LENGTH or not set(token) <= _TOKEN_CHARACTERS:
        raise InvalidInput(
            f"{source}: an admin token has at least {_MIN_TOKEN_LENGTH} letters, digits or -_.~+/; "
            "for example from `openssl rand -hex 32`"
        )
    return token


def token_arguments(token: str) -> list[str]:
    protocols = ",".join(RESTRICTED_PROTOCOLS)
    return [f"--{flag}={protocols}:{TOKEN_KEY}={token}" for flag in ("grpc-restricted-protocol", "http-restricted-api")]


def _check(what: str, load: Callable[..., object], *args: object) -> None:
    try:
        load(*args)
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or getattr(error, "reason", None) or "not a PEM file"
        raise InvalidInput(f"{what}: TLS cannot use it: {reason}") from error
