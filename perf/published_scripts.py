"""The published evaluation scripts, cn_clip.eval.*, run as they are on the CPU, in a process of their own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tuwen.errors import MissingDependency

# They call .cuda() on every tensor; where there is no GPU a tensor stays where it is.
_RUN_ALL = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    if "topk" in sys.argv[0]:
        import torch
        torch.Tensor.cuda = lambda self, *args, **kwargs: self
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def published_script(name: str) -> Path:
    """The file of one of them, such as make_topk_predictions.

    Raises:
        MissingDependency: cn_clip is not installed.
    """
    found = importlib.util.find_spec("cn_clip")
    if found is None or not found.submodule_search_locations:
        raise MissingDependency("the published implementation: pip install --no-deps cn-clip==1.6.0 six")
    return Path(found.submodule_search_locations[0]) / "eval" / f"{name}.py"


def published_command(*commands: Sequence[str | Path]) -> list[str]:
    """The command line that runs scripts one after the other, each given by its name and then its arguments.

    Raises:
        MissingDependency: cn_clip is not installed.
    """
    arguments = [[str(published_script(str(name))), *map(str, rest)] for name, *rest in commands]
    return [sys.executable, "-c", _RUN_ALL, json.dumps(arguments)]


def run_published(*commands: Sequence[str | Path]) -> str:
    """Run scripts as `published_command` has them; returns what they print.

    Raises:
        MissingDependency: cn_clip is not installed.
        subprocess.CalledProcessError: one failed.
    """
    return subprocess.run(published_command(*commands), check=True, text=True, capture_output=True).stdout
