"""Tokens and TLS files are checked before Triton sees them, and never appear in an error."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tuwen.errors import InvalidInput
from tuwen.serving.access import Tls, check_token, make_tls, new_token, read_token, token_arguments


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


def test_a_pair_of_pem_files_is_taken(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    Tls(cert, key).check()
    Tls(cert, key, client_ca_path=cert).check()
    assert Tls(cert, key).arguments()[0] == "--grpc-use-ssl=true"
    assert Tls(cert, key, cert).arguments()[0] == "--grpc-use-ssl-mutual=true"


def test_files_that_tls_cannot_use_are_named(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("nothing")
    for files in (Tls(tmp_path / "absent", key), Tls(garbage, key), Tls(key, cert), Tls(cert, key, garbage)):
        with pytest.raises(InvalidInput, match=r"\.pem|absent"):
            files.check()


def test_tls_files_go_together(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    assert make_tls(None, None, None) is None
    assert make_tls(cert, key, None) == Tls(cert, key)
    for some in ((cert, None, None), (None, key, None), (None, None, cert)):
        with pytest.raises(InvalidInput, match="go together"):
            make_tls(*some)


def test_a_token_comes_from_a_file_of_its_owner_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o644)
    with pytest.raises(InvalidInput, match="others may read") as raised:
        read_token(path)
    assert "0123456789abcdef" not in str(raised.value)
    path.chmod(0o600)
    assert read_token(path) == "0123456789abcdef"
    monkeypatch.delenv("TUWEN_ADMIN_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("TUWEN_ADMIN_TOKEN", "fedcba9876543210")
    assert read_token(None) == "fedcba9876543210"
    with pytest.raises(InvalidInput, match="cannot read"):
        read_token(tmp_path / "absent")


BAD_TOKENS = ["short", "with space and more", "colon:equals=comma,", "令牌" * 8]


@pytest.mark.parametrize("token", BAD_TOKENS)
def test_a_token_that_would_not_survive_a_header_is_refused_unseen(token: str) -> None:
    with pytest.raises(InvalidInput, match="at least 16") as raised:
        check_token(token, "somewhere")
    assert token not in str(raised.value)


def test_a_new_token_is_a_token_and_opens_four_protocols() -> None:
    token = new_token()
    assert check_token(token, "new") == token != new_token()
    for argument in token_arguments(token):
        for protocol in ("model-repository", "trace", "logging", "shared-memory"):
            assert protocol in argument
