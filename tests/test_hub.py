"""load_from_name: local paths, and downloads through the hubs' own libraries from a local HTTP server."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

import tuwen
from tests.conftest import random_model, two_layers
from tuwen.checkpoint import save_checkpoint, save_official
from tuwen.errors import InvalidInput
from tuwen.hub import DownloadFailed, download
from tuwen.specs import SPECS

COMMIT = "0" * 40


@dataclass
class FakeHub:
    """What both hubs answer for one file; `ranges` records the Range headers that were asked for."""

    content: bytes
    sha256: str
    cut_after: int | None = None
    ranges: list[str | None] = field(default_factory=list)
    url: str = ""


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self._file(body=False)

        def do_GET(self) -> None:
            if self.path.startswith("/api/v1/models/") and "/repo/files" in self.path:
                name = SPECS_FILE
                entry = {"Path": name, "Name": name, "Type": "blob", "Sha256": hub.sha256, "Size": len(hub.content)}
                self._json({"Code": 200, "Success": True, "Data": {"Files": [entry | {"Revision": COMMIT}]}})
            elif "/revisions" in self.path:
                branches = [{"Revision": "master", "CreatedAt": 0}]
                self._json({"Code": 200, "Success": True, "Data": {"RevisionMap": {"Branches": branches, "Tags": []}}})
            elif SPECS_FILE in self.path:
                self._file(body=True)
            else:
                self._json({"Code": 200, "Success": True, "Data": {}})

        def _json(self, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _file(self, body: bool) -> None:
            wanted = self.headers.get("Range")
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
            data = hub.content[start:]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Accept-Ranges", "bytes")
            if wanted:
                total = len(hub.content)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.send_header("ETag", f'"{hub.sha256}"')
            self.send_header("X-Linked-Etag", f'"{hub.sha256}"')
            self.send_header("X-Linked-Size", str(len(hub.content)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if not body:
                return
            hub.ranges.append(wanted)
            if hub.cut_after is not None:
                data, hub.cut_after = data[: hub.cut_after], None
                self.wfile.write(data)
                self.wfile.flush()
                self.connection.close()
                return
            self.wfile.write(data)

    return Handler


SPECS_FILE = "clip_cn_vit-b-16.pt"


@pytest.fixture
def official_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A real official file of a two-layer ViT-B-16, which stands in the table for the full one."""
    spec = two_layers("ViT-B-16")
    monkeypatch.setitem(SPECS, "ViT-B-16", spec)
    path = tmp_path / "official.pt"
    save_official(random_model(spec), path)
    return path.read_bytes()


@pytest.fixture
def hub(official_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(official_bytes, hashlib.sha256(official_bytes).hexdigest())
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    import huggingface_hub.constants as constants

    # The library reads HF_ENDPOINT when it is imported, which a test cannot precede.
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}")
    yield fake
    server.shutdown()
    server.server_close()


def test_a_published_name_is_downloaded_checked_and_loaded(hub: FakeHub, tmp_path: Path) -> None:
    root = tmp_path / "weights"
    model, preprocess = tuwen.load_from_name("ViT-B-16", device="cpu", download_root=root)
    pixel_values = preprocess(Image.new("RGB", (40, 30), "red"))
    assert pixel_values.shape == (3, 224, 224)
    with torch.inference_mode():
        assert model.encode_image(pixel_values[None]).shape == (1, 512)
        assert model.encode_text(tuwen.tokenize(["红色"])).shape == (1, 512)
    assert (root / SPECS_FILE).read_bytes() == hub.content


def test_what_is_there_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    download("ViT-B-16", tmp_path / "weights")
    fetched = len(hub.ranges)
    assert fetched >= 1
    download("ViT-B-16", tmp_path / "weights")
    assert len(hub.ranges) == fetched


def test_a_cut_connection_is_resumed_where_it_broke(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after = 25_000_000  # the library writes 10 MB at a time
    assert download("ViT-B-16", tmp_path / "weights").read_bytes() == hub.content
    assert hub.ranges[0] is None
    starts = [int(wanted.removeprefix("bytes=").split("-")[0]) for wanted in hub.ranges[1:] if wanted]
    assert starts
    assert 0 < starts[0] <= 25_000_000


def test_a_wrong_sha256_is_refused_and_removed(hub: FakeHub, tmp_path: Path) -> None:
    hub.sha256 = "f" * 64
    with pytest.raises(DownloadFailed, match=r"SHA-256 is .*, the hub says ffff"):
        download("ViT-B-16", tmp_path / "weights")
    assert not (tmp_path / "weights" / SPECS_FILE).exists()


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    with pytest.raises(DownloadFailed, match=r"clip_cn_rn50\.pt could not be fetched from Hugging Face: "):
        download("RN50", tmp_path)


def test_modelscope_downloads_by_its_own_library(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("modelscope")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", hub.url.removeprefix("http://"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    path = download("ViT-B-16", tmp_path / "weights", use_modelscope=True)
    assert path.read_bytes() == hub.content


# --- local paths ----------------------------------------------------------------------------------------------


def test_a_checkpoint_folder_works_in_place_of_a_name(small_model, tmp_path: Path) -> None:
    save_checkpoint(small_model, tmp_path / "mine")
    model, preprocess = tuwen.load_from_name(str(tmp_path / "mine"), device="cpu")
    assert model.spec == small_model.spec
    resolution = small_model.spec.vision.resolution
    assert preprocess(Image.new("L", (10, 10))).shape == (3, resolution, resolution)


def test_an_official_file_works_in_place_of_a_name_at_another_resolution(official_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "local.pt"
    path.write_bytes(official_bytes)
    model, preprocess = tuwen.load_from_name(str(path), device="cpu", input_resolution=288)
    assert model.spec.vision.resolution == 288
    assert model.encode_image(preprocess(Image.new("RGB", (9, 9)))[None]).shape == (1, 512)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"model 'ViT-X': .*ViT-B-16, ViT-L-14, ViT-L-14-336, ViT-H-14, RN50"):
        tuwen.load_from_name("ViT-X")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_here_is_one_sentence(device: str, small_model, tmp_path: Path) -> None:
    save_checkpoint(small_model, tmp_path / "mine")
    with pytest.raises(InvalidInput, match=f"device '{device}' cannot be used here: "):
        tuwen.load_from_name(str(tmp_path / "mine"), device=device)


def test_available_models_are_the_published_five() -> None:
    assert sorted(tuwen.available_models()) == ["RN50", "ViT-B-16", "ViT-H-14", "ViT-L-14", "ViT-L-14-336"]
