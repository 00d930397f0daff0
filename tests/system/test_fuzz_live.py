"""A short fuzzing run against the real server, and that the run would notice a process that ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from perf.fuzz import live
from tests.system.conftest import some_ports
from tuwen.serving.server import EmbeddedServer

pytestmark = pytest.mark.triton


def test_200_inputs_are_embedded_or_refused_and_nothing_changes(sample_server: EmbeddedServer) -> None:
    findings = live.fuzz_own_server(sample_server, 1, range(200))
    assert not findings.failures
    assert findings.outcomes.total() == 200
    assert findings.outcomes["image: ok"] > 10
    assert findings.outcomes["text: ok"] > 10
    assert "tritonserver" in findings.rss_mib
    assert any(name.startswith("preprocess_image_64") for name in findings.rss_mib)


def test_a_model_process_that_dies_is_a_finding(sample_repository: Path) -> None:
    with some_ports().serve(sample_repository) as server:
        victim = next(pid for pid, name in live._processes(server).items() if name.startswith("tokenize_text"))

        def kill(done: int) -> None:
            if done == 10:
                os.kill(victim, signal.SIGKILL)

        findings = live.fuzz_own_server(server, 1, range(40), kill)
    complaints = " ".join(findings.failures)
    assert "not healthy" in complaints
    assert "a good request afterwards fails" in complaints
    assert "processes ended meanwhile: tokenize_text_0_0" in complaints
