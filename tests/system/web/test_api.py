"""The site as programs see it: JSON, pictures, health, limits and headers."""

from __future__ import annotations

import io
import signal
import socket
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image
from tuwen_web.uploads import MAX_UPLOAD_BYTES, MAX_UPLOADS

from tests.system.web.conftest import NO_PICTURE, Site, read, site
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton


def test_a_phrase_finds_its_picture(folder_site: Site) -> None:
    answer = folder_site.search(q="墨镜", limit=3)
    assert answer.status == 200
    first = answer.json["results"][0]
    assert len(answer.json["results"]) == 3
    assert first["name"] in ("墨镜.png", "<img src=x onerror='window.hit=1'>.png")  # the same picture twice
    assert 0.7 < first["cosine"] <= 1
    assert answer.json["tags"] == []
    assert answer.json["truncated"] is False
    assert answer.json["embed_ms"] > 0


def test_a_picture_finds_itself_and_its_name(sample_site: Site, emoji: dict[str, bytes]) -> None:
    """Among 1,852; and again by its index, without the server."""
    posted = sample_site.ask("/api/search?limit=2", emoji["哭泣的猫"]).json
    assert posted["results"][0]["name"] == "哭泣的猫"
    assert posted["results"][0]["cosine"] == pytest.approx(1, abs=1e-4)
    assert "哭泣的猫" in [tag["name"] for tag in posted["tags"]]
    again = sample_site.search(similar=posted["results"][0]["index"], limit=2).json
    assert [one["index"] for one in again["results"]] == [one["index"] for one in posted["results"]]
    assert again["embed_ms"] is None


def test_a_long_query_says_that_it_was_cut(folder_site: Site) -> None:
    assert folder_site.search(q="猫" * 100).json["truncated"] is True


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/api/search", 400, "the query is empty"),
        ("/api/search?q=%20", 400, "the query is empty"),
        ("/api/search?q=" + "a" * 257, 400, "the query has 257 characters, the limit is 256"),
        ("/api/search?q=a&limit=0", 400, "limit is 0, expected 1 to 192"),
        ("/api/search?q=a&limit=193", 400, "limit is 193, expected 1 to 192"),
        ("/api/search?q=a&limit=-1", 400, "limit is '-1', expected a whole number"),
        ("/api/search?q=a&limit=" + "9" * 5000, 400, "limit is '99999999999999999999', expected a whole number"),
        ("/api/search?similar=106", 404, "there is no picture 106, they are numbered 0 to 105"),
        ("/pictures/106", 404, "there is no picture 106, they are numbered 0 to 105"),
        ("/pictures/0?size=huge", 400, "size is 'huge', expected 'small' or 'large'"),
    ],
)
def test_what_cannot_be_answered_is_said(folder_site: Site, path: str, status: int, sentence: str) -> None:
    answer = folder_site.ask(path)
    assert (answer.status, answer.json["error"]) == (status, sentence)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [(b"no picture", "image is not a readable picture file"), (b"", "there is no picture in the request")],
)
def test_a_bad_picture_gets_the_servers_sentence(folder_site: Site, body: bytes, sentence: str) -> None:
    answer = folder_site.ask("/api/search", body)
    assert answer.status == 400
    assert answer.json["error"].startswith(sentence)


@pytest.mark.parametrize("path", ["/pictures/..%2f..%2fetc%2fpasswd", "/static/..%2f..%2fapp.py", "/static/../app.py"])
def test_no_path_leads_to_another_file(folder_site: Site, path: str) -> None:
    assert folder_site.ask(path).status == 404


# --- pictures -------------------------------------------------------------------------------------------------------


def test_a_picture_is_encoded_anew_and_cached(folder_site: Site) -> None:
    path = folder_site.search(q="墨镜").json["results"][0]["picture"]
    answer = folder_site.ask(path)
    assert (answer.status, answer.headers["content-type"]) == (200, "image/webp")
    assert Image.open(io.BytesIO(answer.body)).format == "WEBP"
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert "immutable" in answer.headers["cache-control"]
    assert folder_site.ask(path.split("?")[0]).headers["cache-control"] == "private, no-cache"
    again = folder_site.ask(path, if_none_match=answer.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    large = folder_site.ask(path + "&size=large", if_none_match=answer.headers["etag"])
    assert large.status == 200
    assert large.headers["etag"] != answer.headers["etag"]


def test_html_in_a_picture_folder_is_not_served(folder_site: Site, folder: Path) -> None:
    """It was named when it was left out, and its index yields a sentence."""
    assert f"skipped {NO_PICTURE}: image is not a readable picture file" in folder_site.log
    index = sorted(folder.iterdir()).index(folder / NO_PICTURE)
    for path in (f"/pictures/{index}", f"/api/search?similar={index}"):
        answer = folder_site.ask(path)
        assert (answer.status, answer.headers["content-type"]) == (404, "application/json")


# --- who may ask ----------------------------------------------------------------------------------------------------


def test_every_answer_has_the_security_headers(folder_site: Site) -> None:
    for path in ("/", "/?q=a", "/api/search", "/pictures/0", "/static/search.js", "/healthz", "/nothing"):
        headers = folder_site.ask(path).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["referrer-policy"] == "no-referrer", path
        assert headers["x-frame-options"] == "DENY", path
        assert "default-src" in headers["content-security-policy"], path
        assert "server" not in headers, path
    assert "frame-ancestors 'none'" in folder_site.ask("/").headers["content-security-policy"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1"])
def test_another_host_name_is_refused(folder_site: Site, host: str) -> None:
    """On loopback, against DNS rebinding; health alone may be asked by any."""
    assert folder_site.ask("/?q=a", host=host).status == 421
    assert folder_site.ask("/healthz", host=host).status == 200


def test_loopback_names_are_served(folder_site: Site) -> None:
    for host in ("localhost", f"127.0.0.1:{folder_site.port}", "[::1]:80", "LOCALHOST:1"):
        assert folder_site.ask("/", host=host).status == 200, host


def test_pages_of_other_sites_may_not_post(folder_site: Site, emoji: dict[str, bytes]) -> None:
    assert folder_site.ask("/api/search", emoji["墨镜"], sec_fetch_site="cross-site").status == 403
    assert folder_site.ask("/api/search", emoji["墨镜"], sec_fetch_site="same-origin").status == 200


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_large_picture_is_refused_by_its_length_alone(folder_site: Site) -> None:
    with closing(half_sent(folder_site, MAX_UPLOAD_BYTES + 1, b"")) as connection:
        answer = read(connection.getresponse())
    assert answer.status == 413
    assert answer.json["error"] == "the picture is larger than 16 MiB, the limit"


def test_a_body_without_a_length_is_read_no_further_than_the_limit(folder_site: Site) -> None:
    """One that never ends gets its answer all the same."""
    with socket.create_connection(("127.0.0.1", folder_site.port), timeout=20) as raw:
        raw.sendall(b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        for _ in range(17):  # MiB; the terminating chunk never comes
            raw.sendall(chunk)
        assert raw.recv(64).startswith(b"HTTP/1.1 413 ")


def half_sent(running: Site, length: int, part: bytes) -> HTTPConnection:
    connection = HTTPConnection("127.0.0.1", running.port, timeout=20)
    connection.putrequest("POST", "/api/search?limit=1")
    connection.putheader("Content-Length", str(length))
    connection.endheaders(part)
    return connection


def test_too_many_uploads_are_refused_and_the_others_finish(folder_site: Site, emoji: dict[str, bytes]) -> None:
    picture = emoji["墨镜"]
    waiting = [half_sent(folder_site, len(picture), picture[:100]) for _ in range(MAX_UPLOADS)]
    refused = folder_site.ask("/api/search", picture)
    assert refused.status == 503
    assert refused.json == {"error": "8 pictures are being searched, try again in a moment", "kind": "busy"}
    assert refused.headers["retry-after"] == "1"
    assert folder_site.search(q="猫").status == 200  # texts are none the worse
    for connection in waiting:
        connection.send(picture[100:])
        assert read(connection.getresponse()).status == 200
        connection.close()
    assert folder_site.ask("/api/search", picture).status == 200


# --- its life -------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_what_is_under_way(
    folder: Path, sample_server: EmbeddedServer, emoji: dict[str, bytes], tmp_path: Path
) -> None:
    """Exit 0; queries are not in the log."""
    picture = emoji["墨镜"]
    with site(folder, sample_server.endpoints.grpc, tmp_path, "--allow-host", "pictures.example") as running:
        running.await_ready()
        assert running.ask(f"/?q={quote('秘密的猫')}", host="pictures.example").status == 200
        connection = half_sent(running, len(picture), picture[:100])
        assert running.search(q="猫").status == 200  # the half is there by now
        running.process.send_signal(signal.SIGTERM)
        connection.send(picture[100:])
        assert read(connection.getresponse()).status == 200
        assert running.process.wait(timeout=20) == 0
        assert running.log.endswith("stopped\n")
        assert "秘密" not in running.log


def test_a_folder_without_a_picture_ends_it(sample_server: EmbeddedServer, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"no picture")
    with site(pictures, sample_server.endpoints.grpc, tmp_path) as running:
        assert running.process.wait(timeout=30) == 1
        assert running.log.endswith("error: none of the 1 pictures can be embedded\n")


def test_a_taken_port_is_one_sentence(folder_site: Site, folder: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"error: cannot listen on 127.0.0.1:\d+: Address already in use"),
        site(folder, "127.0.0.1:1", tmp_path, "--port", str(folder_site.port)),
    ):
        pass
