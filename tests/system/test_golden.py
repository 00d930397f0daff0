"""The examples of clients/golden, run as its README says, against the real server."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders.golden import GOLDEN_PATH
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton
GOLDEN_DIR = GOLDEN_PATH.parent
README = (GOLDEN_DIR / "README.md").read_text(encoding="utf-8")
Check = Callable[[Path], subprocess.CompletedProcess[str]]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(params=["python", "java", "go"])
def check(request: pytest.FixtureRequest, sample_server: EmbeddedServer) -> Check:
    """Runs one language's check with a golden file."""
    program, grpc, http = request.param, sample_server.endpoints.grpc, sample_server.endpoints.http
    command = {
        "python": [sys.executable, str(GOLDEN_DIR / "check.py"), grpc],
        "java": ["java", str(GOLDEN_DIR / "Check.java"), http],
        "go": ["go", "run", str(GOLDEN_DIR / "check.go"), http],
    }[program]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{program} is not installed, so its example is not run")
    assert f"{program if program != 'go' else 'go run'} clients/golden/{Path(command[-2]).name} " in README
    return lambda golden: run(*command, str(golden))


@pytest.fixture
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN_PATH.read_text(encoding="ascii"))


def test_an_example_finds_all_golden_vectors_on_the_server(check: Check, golden: dict[str, Any]) -> None:
    done = check(GOLDEN_PATH)
    assert done.stdout == f"{len(golden['texts'])} texts, {len(golden['pictures'])} pictures, 0 wrong\n", done.stderr
    assert done.returncode == 0


def test_an_example_names_what_is_wrong(check: Check, golden: dict[str, Any], tmp_path: Path) -> None:
    texts, pictures = golden["texts"][:3], golden["pictures"][:2]
    texts[1]["input_ids"][1] += 1
    texts[2]["text_embeds"] = golden["texts"][3]["text_embeds"]
    pictures[1]["image_embeds"] = golden["pictures"][-1]["image_embeds"][::-1]
    # One off: what is lost first where a 63-bit number becomes a double.
    model = golden["model"] | {"fingerprint": str(int(golden["model"]["fingerprint"]) + 1)}
    path = tmp_path / "golden.json"
    path.write_text(json.dumps(golden | {"texts": texts, "pictures": pictures, "model": model}))
    done = check(path)
    assert done.stdout.splitlines() == [
        "input_ids of text 1",
        "text_embeds of text 2",
        "fingerprint: another model is served",
        f"image_embeds of {pictures[1]['name']}",
        "fingerprint: another model is served",
        "3 texts, 2 pictures, 5 wrong",
    ]
    assert done.returncode == 1


def embed(server: EmbeddedServer, kind: str, item: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    return run(str(GOLDEN_DIR / "embed.sh"), server.endpoints.http, "tiny_rn", kind, item)


def read_embeds(answer: str, name: str) -> np.ndarray:
    (output,) = (output for output in json.loads(answer)["outputs"] if output["name"] == name)
    return np.array(output["data"])


def test_curl_gets_the_golden_embeddings(sample_server: EmbeddedServer, golden: dict[str, Any], tmp_path: Path) -> None:
    least = golden["tolerance"]["min_cosine"]
    for entry in golden["texts"][:3]:
        done = embed(sample_server, "text", entry["text"])
        assert read_embeds(done.stdout, "text_embeds") @ np.array(entry["text_embeds"]) >= least
    for entry in golden["pictures"][:3]:
        path = tmp_path / entry["name"]
        path.write_bytes(base64.b64decode(entry["file"]))
        done = embed(sample_server, "image", str(path))
        assert read_embeds(done.stdout, "image_embeds") @ np.array(entry["image_embeds"]) >= least


def test_curl_shows_a_refusal_and_fails(sample_server: EmbeddedServer) -> None:
    done = embed(sample_server, "text", " ")
    assert "text is empty" in json.loads(done.stdout)["error"]
    assert done.returncode == 22
