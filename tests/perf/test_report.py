"""report.html and curves.png of a run with known figures."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from perf.report import write_report
from perf.summary import Summary
from tests.perf.runs import summary

pytest.importorskip("matplotlib")

FULL = "the server refused requests: its queue was full"


@pytest.fixture(scope="module")
def run() -> Summary:
    return summary(
        {
            "closed 1": [(111, 8.75, 12.5), (113, 8.25, 13.5), (112, 8.5, 13)],
            "closed 16": [(444.4, 30.25, 99.5)] * 3,
            "open 0.5 of capacity": [(222, 5.125, 17.75)] * 3,
            "open 1.1 of capacity": [FULL, FULL, FULL],
        }
    )


@pytest.fixture(scope="module")
def folder(run: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(run, folder)
    return folder


class _Cells(HTMLParser):
    """The rows of all tables, as text; every tag that opens and does not close is an error."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_every_load_is_a_row_with_its_medians(page: str) -> None:
    cells = _Cells()
    cells.feed(page)
    assert not cells.open
    rows = {row[0]: row for row in cells.rows}
    assert rows["1"][1:] == ["112.0", "9.35", "8.50", "12.75", "15.30", "13.00", "8.25 to 8.75", ""]
    assert rows["16"][1:4] == ["444.4", "33.28", "30.25"]
    assert rows["50 (50%)"][6] == "17.75"
    assert rows["50 (110%)"][1:] == [*["–"] * 7, f"3 of 3: {FULL}"]
    assert rows["open 1.1 of capacity"][1:3] == ["tiny_text_tower", "321"]
    assert rows["open 1.1 of capacity"][-1] == "21"  # refused, over the repeats


def test_the_page_carries_everything_itself(page: str, folder: Path) -> None:
    """No link, script or file outside: the figure is embedded, and equals curves.png."""
    assert all(target.startswith("data:") for target in re.findall(r"(?:src|href)=\"?([^\"]*)", page))
    assert "<script" not in page
    embedded = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert embedded is not None
    assert base64.b64decode(embedded[1]) == (folder / "curves.png").read_bytes()


def test_what_the_figures_hold_for_is_told(page: str) -> None:
    for word in ("Some CPU", "2.51.0", "4711", "capacity_fractions = [0.5]", "tuwen bench run"):
        assert word in page, word


def test_text_from_outside_is_escaped(run: Summary, tmp_path: Path) -> None:
    write_report(replace(run, scenario_text="# <b>&", machine={"cpu": "<i>"}), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "# &lt;b&gt;&amp;" in page
    assert "&lt;i&gt;" in page


def test_the_curves_are_a_drawn_picture(folder: Path) -> None:
    """Both loops' colours are in it."""
    picture = Image.open(io.BytesIO((folder / "curves.png").read_bytes())).convert("RGB")
    assert picture.width >= 800
    colours = {colour for _, colour in picture.getcolors(picture.width * picture.height) or []}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_a_run_in_which_nothing_was_measured_has_a_report(tmp_path: Path) -> None:
    write_report(summary({"closed 1": [FULL], "open 0.5 of capacity": [FULL]}), tmp_path)
    assert FULL in (tmp_path / "report.html").read_text(encoding="utf-8")
