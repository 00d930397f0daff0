"""An image laid out in a plain folder: what its Dockerfile copies and sets is followed, what it installs is linked.

A container's paths are absolute, a folder's are not: `Container.inside` puts the folder in front of each of them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tests.deploy.compose_file import ROOT, Mount
from tuwen.serving.installation import WheelInstallation, find_installation

_FOLDERS = ("usr", "opt", "models", "checkpoints", "pictures", "cache", "results", "home", "tmp")
_PATH = re.compile(rf"(?<![\w./])/(?=(?:{'|'.join(_FOLDERS)})\b)")
_REQUIREMENTS = re.compile(r"-r (\S+)")


@dataclass
class Image:
    """One stage of a Dockerfile.

    Attributes:
        copies: sources in the checkout, and the path that they go to.
        requirements: files of packages that pip installs, by their path in the image.
    """

    base: str
    env: dict[str, str] = field(default_factory=dict)
    copies: list[tuple[list[str], str]] = field(default_factory=list)
    requirements: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    workdir: str = "/"
    user: str = "root"
    command: list[str] = field(default_factory=list)


def read_dockerfile(path: Path, target: str | None = None, args: Mapping[str, str] | None = None) -> Image:
    """The stage `target`, or the only one.

    Raises:
        ValueError: an instruction that is not known here.
    """
    return read_stages(path, args)[target or "only"]


def read_stages(path: Path, args: Mapping[str, str] | None = None) -> dict[str, Image]:
    """Every stage by name, as an engine reads them whichever is asked for; "only" where it has none."""
    stages: dict[str, Image] = {}
    image, values = Image(""), dict(args or {})
    for instruction, rest in _instructions(path):
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            image = Image(_substituted(base, values))
            stages[name or "only"] = image
        elif instruction == "ENV":
            for word in shlex.split(rest):
                name, _, value = word.partition("=")
                image.env[name] = value
        elif instruction == "COPY":
            *sources, destination = rest.split()
            image.copies.append((sources, destination))
        elif instruction == "RUN":
            image.runs.append(rest)
            image.requirements += _REQUIREMENTS.findall(rest)
        elif instruction == "CMD":
            image.command = json.loads(rest)
        elif instruction in ("WORKDIR", "USER"):
            setattr(image, instruction.lower(), rest)
        elif instruction == "ARG":
            name, _, default = rest.partition("=")
            values.setdefault(name, default)
        elif instruction != "EXPOSE":
            raise ValueError(f"{path.name}: {instruction} is not known here")
    return stages


def _instructions(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line]


def _substituted(text: str, args: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: args.get(found[1], ""), text)


@dataclass(frozen=True)
class Container:
    """A folder that stands for a running image."""

    root: Path
    image: Image

    def inside(self, text: str) -> str:
        """`text` with this folder before each path of the image."""
        return _PATH.sub(f"{self.root}/", text)

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Nothing of this process's own but its locale: the image's, and what Compose sets."""
        path = os.pathsep.join([f"{self.root}/venv/bin", f"{self.root}/usr/local/bin", os.defpath])
        base = {"PATH": path, "HOME": f"{self.root}/home", "LANG": "C.UTF-8", "TMPDIR": f"{self.root}/tmp"}
        values = {name: _substituted(value, {}).rstrip(":") for name, value in self.image.env.items()}
        return base | {name: self.inside(value) for name, value in (values | dict(more or {})).items()}

    def start(
        self, command: Sequence[str], more: Mapping[str, str] | None = None, **streams: Any
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.inside(word) for word in command],
            env=self.environment(more),
            cwd=self.inside(self.image.workdir),
            text=True,
            **streams,
        )

    def run(self, command: Sequence[str], timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def lay_out(
    image: Image, root: Path, mounted: Sequence[Mount], volumes_dir: Path, all_packages: bool = False
) -> Container:
    """Fill `root` as the engine would.

    Args:
        volumes_dir: named volumes are folders in here.
        all_packages: link all that is installed here; for an image whose packages pip resolves by itself.
    """
    for folder in ("home", "tmp", "usr/local/bin"):
        (root / folder).mkdir(parents=True)
    for sources, destination in image.copies:
        for source in sources:
            _copy(source, root / destination.lstrip("/"), into=destination.endswith("/"))
    container = Container(root, image)
    installed = [line for path in image.requirements for line in requirement_lines(Path(container.inside(path)))]
    _make_python(root / "venv", None if all_packages else [Requirement(line).name for line in installed])
    for mount in mounted:
        source = volumes_dir / mount.source if mount.is_volume else ROOT / mount.source
        if mount.is_volume:
            source.mkdir(parents=True, exist_ok=True)
        place = root / mount.target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(source.resolve(strict=True))
    return container


def requirement_lines(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def _copy(source: str, destination: Path, into: bool) -> None:
    """Files that git knows or would take: what .dockerignore leaves out is what .gitignore does."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", source],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")[:-1]  # fmt: skip
    assert listed, f"COPY {source}: nothing there"
    for name in listed:
        is_file = (ROOT / source).is_file()
        inner = Path(name).name if is_file else Path(name).relative_to(source)
        target = destination / inner if into or not is_file else destination
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)


def _make_python(folder: Path, packages: Sequence[str] | None) -> None:
    """A Python that has these packages of the one that runs the tests, without what they ask for; or all of them."""
    venv.create(folder, symlinks=True, with_pip=False)
    site = next((folder / "lib").glob("python3*/site-packages"))
    if packages is None:
        (site / "all.pth").write_text(_site_packages(), encoding="utf-8")
        return
    for package in packages:
        found = distribution(package)
        tops = {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))


def _site_packages() -> str:
    return str(Path(str(distribution("numpy").locate_file(""))).resolve())


def stand_in_triton(folder: Path) -> None:
    """The wheel's server laid out as NVIDIA's image has it, with our stand-in for the ONNX Runtime backend."""
    wheel = find_installation()
    assert isinstance(wheel, WheelInstallation)
    binary, python = folder / "bin" / "tritonserver", folder / "backends" / "python"
    shutil.copytree(wheel.python_backend_dir, python)
    shutil.copy(wheel.stub_path, python)
    shutil.copytree(
        ROOT / "tuwen" / "serving" / "embedded_backends" / "onnxruntime", folder / "backends" / "onnxruntime"
    )
    model = folder / "backends" / "onnxruntime" / "model.py"
    # The image's backend is C++: what this one imports is no part of the image's Python.
    model.write_text(
        f"import sys\nsys.path.append({_site_packages()!r})\n" + model.read_text(encoding="utf-8"), encoding="utf-8"
    )
    (folder / "caches").symlink_to(wheel.caches_dir)
    binary.parent.mkdir()
    libraries = os.pathsep.join([str(wheel.libs_dir), f"{sys.base_prefix}/lib"])
    binary.write_text(f'#!/bin/sh\nexport LD_LIBRARY_PATH={libraries}\nexec {wheel.binary} "$@"\n', encoding="utf-8")
    binary.chmod(0o755)
