"""docker-compose.yml as an engine would read it: `.env` filled in, merged, one dictionary a service."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
COMPOSE, ENV = ROOT / "docker-compose.yml", ROOT / ".env"
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)\}|\$(?P<other>.)")


def read_env(path: Path = ENV) -> dict[str, str]:
    """NAME=value lines; a value is used as it stands."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Fill in ${NAME}, the one form that our file uses.

    Raises:
        KeyError: a variable is not defined.
        ValueError: another form of Compose's.
    """

    def value(found: re.Match[str]) -> str:
        if found["name"] is None:
            raise ValueError(f"${found['other']}: only ${{NAME}} is known here")
        return variables[found["name"]]

    return _VARIABLE.sub(value, text)


def services(variables: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    text = interpolate(COMPOSE.read_text(encoding="utf-8"), read_env() if variables is None else variables)
    return yaml.safe_load(text)["services"]


@dataclass(frozen=True)
class Mount:
    """What stands at `target`: a folder or file of the host, or a named volume."""

    source: str
    target: str
    read_only: bool

    @property
    def is_volume(self) -> bool:
        return not self.source.startswith((".", "/"))


def mounts(service: Mapping[str, Any]) -> list[Mount]:
    return [_mount(entry) for entry in service.get("volumes", [])]


def _mount(entry: str | Mapping[str, Any]) -> Mount:
    if not isinstance(entry, str):
        return Mount(entry["source"], entry["target"], entry.get("read_only", False))
    source, target, *mode = entry.split(":")
    return Mount(source, target, mode == ["ro"])
