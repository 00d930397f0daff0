"""`tuwen train --processes`: the processes of a run end with the command that started them, and lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.shapes import shape_pairs, write_pairs
from training.state import newest_state

_TIMEOUT_S = 120

RECIPE = """
model.architecture = "Tiny-ViT"
data.path = "{folder}"
optim = {{max_steps = 100000, batch_size = 10}}
engine.device = "cpu"
valid.split = ""
run.out = "{folder}/run"
"""


@pytest.mark.skipif(sys.platform == "win32", reason="it has no SIGTERM")
def test_a_signal_to_the_command_saves_the_run_of_all_processes(tmp_path: Path) -> None:
    """As a cluster sends it, to that one process: the state is that of the last step, and nobody trains on."""
    write_pairs(tmp_path, "train", shape_pairs())
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path), encoding="utf-8")
    command = [sys.executable, "-m", "tuwen.cli", "train", str(tmp_path / "recipe.toml"), "--processes", "2"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + _TIMEOUT_S
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None, "ended before its first step"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(_TIMEOUT_S)
    assert process.returncode == 0 or sys.platform != "linux"
    lines = metrics.read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])["step"]
    assert newest_state(tmp_path / "run") == tmp_path / "run" / "checkpoints" / f"step_{last:08d}"
    time.sleep(1)
    assert metrics.read_text(encoding="utf-8").splitlines() == lines
