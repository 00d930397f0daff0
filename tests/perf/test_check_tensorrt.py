"""`make check-tensorrt`: a real tower through TensorRT's builder, and a refusal that nobody can overlook."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from builders.towers import TOWERS
from perf import check_tensorrt
from perf.check_tensorrt import (
    ARCHITECTURES,
    PRECISIONS,
    TARGETS,
    TowerCheck,
    check_tower,
    main,
    read_rows,
    to_markdown,
    write_report,
)
from tuwen.errors import TuwenError

DOCS = Path(__file__).parents[2] / "docs"
FINE = TowerCheck("Tiny-RN", "text", "fp32", 116, ("Add",), 337, {one.sm: 0.3 for one in TARGETS}, 12.1, 0.6)
FAILED = TowerCheck("RN50", "image", "fp16", error="image.onnx: TensorRT cannot read it")


def test_a_tower_is_built_in_both_precisions_for_all_targets() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: make .venv/.tensorrt")
    rows = check_tower("Tiny-RN", "image", lambda stage: None)
    assert [row.precision for row in rows] == list(PRECISIONS)
    for row in rows:
        assert row.error == ""
        assert set(row.seconds or {}) == {"sm80", "sm86", "sm89"}
        assert row.num_layers > row.onnx_nodes > 50
    assert rows[1].size_mb < 0.7 * rows[0].size_mb


def test_what_cannot_be_built_is_a_row_that_says_so() -> None:
    """An error in the tower's own process comes back as a sentence, for each precision."""
    rows = check_tower("ViT-G-8", "text", lambda stage: None)
    assert [row.error for row in rows] == [rows[0].error] * 2
    assert rows[0].error.startswith("architecture 'ViT-G-8' is unknown")


def test_a_process_that_is_killed_is_told_from_one_that_works() -> None:
    with pytest.raises(TuwenError, match=r"^the process died"):
        check_tensorrt._in_own_process(os._exit, 9)


def test_a_run_keeps_the_rows_of_other_architectures_and_fails_on_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1, the table with the reason, and the reason again on stderr."""
    write_report([FINE], tmp_path)
    assert read_rows(tmp_path / "tensorrt_check.json") == [FINE]
    monkeypatch.setattr(check_tensorrt, "check_tower", lambda *of: [FAILED])
    monkeypatch.setattr(check_tensorrt, "import_tensorrt", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["check", "--architectures", "RN50", "--out", str(tmp_path)])
    assert main() == 1
    assert read_rows(tmp_path / "tensorrt_check.json") == [FAILED, FAILED, FINE]
    told = capsys.readouterr()
    assert "| RN50 | image | fp16 | **failed**: image.onnx: TensorRT cannot read it |" in told.out
    assert "| Tiny-RN | text | fp32 | 116 | 337 | 0.3 / 0.3 / 0.3 | 12.1 | 0.6 |" in told.out
    assert told.err.count("RN50 image fp16: image.onnx") == 2
    assert set(json.loads((tmp_path / "tensorrt_check.json").read_text(encoding="utf-8"))) == {"tools", "rows"}


def test_the_page_shows_every_tower_of_every_architecture_built() -> None:
    rows = read_rows(DOCS / "tensorrt_check.json")
    assert [row for row in rows if row.error] == []
    assert {(row.architecture, row.tower, row.precision) for row in rows} == {
        (name, kind, precision) for name in ARCHITECTURES for kind in TOWERS for precision in PRECISIONS
    }
    tools = json.loads((DOCS / "tensorrt_check.json").read_text(encoding="utf-8"))["tools"]
    assert to_markdown(rows, tools) in (DOCS / "tensorrt_check.md").read_text(encoding="utf-8")
