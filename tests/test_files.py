"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tuwen import files
from tuwen.files import atomic_file, replace_folder, write_text


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, can_exchange: bool, monkeypatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = folder(tmp_path / "target", "old")
    (target / "stale").touch()
    replace_folder(folder(tmp_path / ".staging", "new"), target)
    assert (target / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(target) == ["file"]


def test_the_swap_is_one_step_here(tmp_path: Path, monkeypatch) -> None:
    """On Linux the target exists at every moment: no rename but the swap itself touches it."""
    target, staging = folder(tmp_path / "target", "old"), folder(tmp_path / ".staging", "new")

    def forbidden(*args: object) -> None:
        raise AssertionError("a second rename")

    monkeypatch.setattr(os, "replace", forbidden)
    replace_folder(staging, target)
    assert (target / "file").read_text() == "new"


def test_a_folder_appears_where_there_was_none(tmp_path: Path) -> None:
    replace_folder(folder(tmp_path / ".staging", "new"), tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fill_the_disk() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
