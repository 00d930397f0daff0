"""OpenTelemetry is an extra: without it the client works, and sends no trace headers."""

from __future__ import annotations

import subprocess
import sys


def test_the_client_needs_no_opentelemetry() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None  # as if it were not installed
import tuwen_client
from tuwen_client.tracing import client_span
with client_span("embed_text", "tiny_rn", "localhost:8001") as headers:
    print(headers)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "()\n"), done.stderr
