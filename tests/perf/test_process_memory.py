"""A process's largest memory is its own, however large the process is that started it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from perf.processes import PeakRss, peak_rss_bytes

MIB = 2**20


def peak_of(script: str) -> int:
    with subprocess.Popen([sys.executable, "-c", script]) as process, PeakRss(process.pid) as peak:
        process.wait()
    return peak.bytes


def test_what_the_parent_holds_does_not_count() -> None:
    held = np.ones(300 * MIB, np.uint8)
    own = peak_of("import time; time.sleep(0.3)")
    assert 2 * MIB < own < 100 * MIB
    assert peak_rss_bytes() > len(held)


def test_the_peak_counts_and_not_the_end() -> None:
    script = "import time; a = b'x' * (400 * 2**20); del a; time.sleep(0.3)"
    assert 350 * MIB < peak_of(script) < 500 * MIB


def test_a_process_that_is_over_has_none() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert peak_rss_bytes(process.pid) == 0
