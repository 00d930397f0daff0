"""Every snippet of docs/client.md runs, in order, against real servers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tuwen_client import Client

from tests.system.conftest import ROOT, Ports
from tuwen.data.pairs import PairSet
from tuwen.serving.access import Tls
from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton

SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def workplace(sample_pairs: PairSet, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the snippets are written for; two of its pictures are the same at two sizes."""
    (tmp_path / "photos").mkdir()
    for position in range(12):
        encoded = sample_pairs.image_bytes(sample_pairs.image_ids[position * 90])
        (tmp_path / "photos" / f"{position:02d}.webp").write_bytes(encoded)
    with Image.open(tmp_path / "photos" / "05.webp") as picture:
        picture.convert("RGB").resize((picture.width * 2, picture.height * 2)).save(tmp_path / "photos" / "05_big.png")
    (tmp_path / "captions.txt").write_text("一只猫\n" + "很" * 80 + "\n戴墨镜的笑脸\n", encoding="utf-8")
    for name in ("ca.pem", "client.pem", "client.key"):
        shutil.copy(certificates / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_runs(
    workplace: Path,
    certificates: Path,
    sample_server: EmbeddedServer,
    sample_repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TUWEN_ADMIN_TOKEN", sample_server.admin_token)
    document = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    ports = Ports(*free_ports(3))
    tls = Tls(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    near = sample_server.endpoints.grpc
    here: dict[str, object] = {}
    with EmbeddedServer(
        sample_repository, grpc_port=ports.grpc, http_port=ports.http, metrics_port=ports.metrics, tls=tls
    ) as far:
        for written, meant in {
            "localhost:8001": near,
            "gpu1:8001,gpu2:8001": f"{near},localhost:{near.rpartition(':')[2]}",
            "search.example:8443": far.endpoints.grpc,
        }.items():
            assert written in document
            document = document.replace(written, meant)
        snippets = SNIPPET.findall(document)
        assert len(snippets) >= 11
        for snippet in snippets:
            exec(compile(snippet, "docs/client.md", "exec"), here)  # noqa: S102, our own document
    for one in here.values():
        if isinstance(one, Client):
            one.close()
    printed = capsys.readouterr().out
    assert "1 captions were longer" in printed
    assert "('05.webp', '05_big.png')" in printed, "the duplicate was found"
    assert "item 1: image is not a readable picture" in printed
    assert '(400, "item 0: text is empty' in printed
    assert printed.rstrip().endswith("True"), "the encrypted server was ready"
