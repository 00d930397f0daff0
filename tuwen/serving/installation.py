"""The `tritonserver` that is run: where it lies, its backend folder, its environment.

The one inside the wheel nvidia-pytriton, which has the Python backend but none for ONNX Runtime: ours joins it. Or, in
NVIDIA's image, the one that TUWEN_TRITON_DIR names, /opt/tritonserver, with all its backends.
"""

import ctypes.util
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tuwen.errors import MissingDependency

TRITON_DIR_VARIABLE = "TUWEN_TRITON_DIR"
_INSTALL_HINT = "pip install 'tuwen[serve]'"
# The wheel's tag is manylinux_2_35; pip would refuse it elsewhere, a copied venv would not.
_MIN_GLIBC = (2, 35)
_STUB_NAME = "triton_python_backend_stub"
MALLOC_ARENAS = "2"
_PACKAGE_DIR = Path(__file__).resolve().parents[1]
_EMBEDDED_BACKENDS_DIR = _PACKAGE_DIR / "serving" / "embedded_backends"
_PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class ImageInstallation:
    """The server of NVIDIA's image: complete, and at home in the environment that the image made."""

    binary: Path
    backends_dir: Path
    caches_dir: Path


@dataclass(frozen=True)
class WheelInstallation:
    """Files of the wheel that a server needs."""

    binary: Path
    libs_dir: Path
    python_backend_dir: Path
    stub_path: Path
    caches_dir: Path


Installation = ImageInstallation | WheelInstallation


def find_installation() -> Installation:
    """The server in TUWEN_TRITON_DIR; without that, the wheel's for this Python.

    Raises:
        MissingDependency: no server there; or no wheel, or this platform, Python or numpy does not go with it.
    """
    triton_dir = os.environ.get(TRITON_DIR_VARIABLE)
    return _find_in_image(Path(triton_dir)) if triton_dir else _find_in_wheel()


def _find_in_image(triton_dir: Path) -> ImageInstallation:
    installation = ImageInstallation(
        triton_dir / "bin" / "tritonserver", triton_dir / "backends", triton_dir / "caches"
    )
    if not installation.binary.is_file():
        raise MissingDependency(f"{TRITON_DIR_VARIABLE}={triton_dir}: no server there, expected bin/tritonserver")
    return installation


def _find_in_wheel() -> WheelInstallation:
    _require_platform()
    spec = importlib.util.find_spec("pytriton")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency(f"the embedded server needs nvidia-pytriton: {_INSTALL_HINT}")
    package_dir = Path(spec.submodule_search_locations[0])
    triton_dir = package_dir / "tritonserver"
    stubs_dir = triton_dir / "python_backend_stubs"
    installation = WheelInstallation(
        binary=triton_dir / "bin" / "tritonserver",
        libs_dir=package_dir.parent / "nvidia_pytriton.libs",
        python_backend_dir=triton_dir / "backends" / "python",
        stub_path=stubs_dir / _PYTHON_VERSION / _STUB_NAME,
        caches_dir=triton_dir / "caches",
    )
    if not installation.binary.is_file():
        raise MissingDependency(f"nvidia-pytriton is incomplete, {installation.binary} is missing: {_INSTALL_HINT}")
    if not installation.stub_path.is_file():
        offered = ", ".join(sorted((path.name for path in stubs_dir.glob("3.*")), key=lambda name: int(name[2:])))
        raise MissingDependency(f"this Python is {_PYTHON_VERSION}, nvidia-pytriton serves {offered}: use one of these")
    _require_numpy_1()
    _require_shared_python(installation.libs_dir)
    return installation


def assemble_run_dir(installation: Installation, run_dir: Path) -> Path:
    """Fill an empty folder, the server's working folder, with a link to this tuwen; returns the folder of backends.

    The wheel's backends and ours are put together there, as copies: Triton refuses a backend library whose real path
    lies outside the backend folder ("backend library name 'libtriton_python.so' escapes backend directory").
    """
    # A model process ignores PYTHONPATH (its Python is isolated) but looks in its working folder before site-packages:
    # so it imports the tuwen that started it, whether installed, editable or on our path.
    (run_dir / "tuwen").symlink_to(_PACKAGE_DIR, target_is_directory=True)
    if isinstance(installation, ImageInstallation):
        return installation.backends_dir
    backends_dir = run_dir / "backends"
    python_dir = backends_dir / "python"
    shutil.copytree(installation.python_backend_dir, python_dir, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(installation.stub_path, python_dir / _STUB_NAME)
    (python_dir / _STUB_NAME).chmod(0o755)
    for model_path in _EMBEDDED_BACKENDS_DIR.glob("*/model.py"):
        backend_dir = model_path.parent
        shutil.copytree(backend_dir, backends_dir / backend_dir.name, ignore=shutil.ignore_patterns("__pycache__"))
    return backends_dir


def server_environment(installation: Installation) -> dict[str, str]:
    """This process's environment, changed so that model processes run this Python and see its site-packages."""
    environment = dict(os.environ)
    # Pictures are decoded in threads, each of which would keep memory of its own: 20 MiB more after 100,000 odd files.
    environment.setdefault("MALLOC_ARENA_MAX", MALLOC_ARENAS)
    if isinstance(installation, ImageInstallation):
        return environment
    # A model process embeds Python and finds its prefix, hence the venv's packages, through `python3` on PATH.
    environment["PATH"] = _joined([str(Path(sys.executable).parent)], environment.get("PATH"))
    library_dirs = [str(installation.libs_dir), *(str(directory) for directory in _python_library_dirs())]
    environment["LD_LIBRARY_PATH"] = _joined(library_dirs, environment.get("LD_LIBRARY_PATH"))
    return environment


def _python_library_dirs() -> list[Path]:
    # Relocated builds (uv, conda) carry the build machine's LIBDIR, so the real prefix is looked at as well.
    candidates = [Path(sysconfig.get_config_var("LIBDIR") or ""), Path(sys.base_prefix) / "lib"]
    return [directory for directory in dict.fromkeys(candidates) if directory.is_absolute() and directory.is_dir()]


def _joined(first: list[str], rest: str | None) -> str:
    return os.pathsep.join([*first, *([rest] if rest else [])])


def _require_platform() -> None:
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # Windows has no confstr, musl and macOS no such name
        libc = ""
    name, _, version = libc.partition(" ")
    if sys.platform == "linux" and name == "glibc" and tuple(map(int, version.split(".")[:2])) >= _MIN_GLIBC:
        return
    here = f"{sys.platform} with {libc or 'another C library'}"
    raise MissingDependency(
        f"the embedded server needs Linux with glibc 2.35, this is {here}: "
        "run it on such a machine, and reach it from here with --url"
    )


def _require_numpy_1() -> None:
    # Seen with nvidia-pytriton 0.7.0: its model processes start with numpy 2, and then every BYTES input fails.
    version = importlib.metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise MissingDependency(f"nvidia-pytriton needs numpy below 2, found {version}: pip install 'numpy<2'")


def _require_shared_python(libs_dir: Path) -> None:
    library = f"libpython{_PYTHON_VERSION}.so.1.0"
    if any((directory / library).exists() for directory in _python_library_dirs()):
        return
    bundled = any(libs_dir.glob(f"libpython3-*.{sys.version_info.minor}.so*"))  # the wheel brings 3.13's
    if bundled or ctypes.util.find_library(f"python{_PYTHON_VERSION}"):
        return
    raise MissingDependency(
        f"this Python has no {library}, which the server's model processes need: install it "
        f"(Debian: apt install libpython{_PYTHON_VERSION}; pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared)"
    )
