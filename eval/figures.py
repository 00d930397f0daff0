"""Pictures of results, as PNG bytes: how recall grows with k, and what a classifier takes for what."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tuwen.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Fonts that know Chinese, those of Linux, macOS and Windows.
_CHINESE_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC",
    "Heiti SC", "Microsoft YaHei", "SimHei", "Noto Sans CJK JP", "Noto Serif CJK SC",
)  # fmt: skip
# Of the recall curve: further out nobody looks.
MAX_CURVE_K = 100
# More labels than this are numbered on the axes, and cells carry no figures: they would not be legible.
_MAX_NAMED = 40
_MAX_COUNTED = 20
# Okabe and Ito's blue and vermilion: they differ in lightness too.
_COLOURS = ("#0072b2", "#d55e00")
_DPI = 110


def recall_figure(ranks: Mapping[str, npt.NDArray[np.int64]], num_items: Mapping[str, int]) -> bytes:
    """PNG: recall@k over k, a line for each direction.

    Args:
        ranks: from 0, by the line's name.
        num_items: what each line's queries are asked of: no k goes beyond it.
    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figure = _new_figure(6.4, 3.8)
    axes = figure.subplots()
    for (name, found), colour in zip(ranks.items(), _COLOURS, strict=False):
        ks = np.arange(1, min(MAX_CURVE_K, num_items[name]) + 1)
        # As many queries as have their right answer at rank k - 1 or before.
        recalls = np.searchsorted(np.sort(found), ks, side="left") / len(found)
        axes.plot(ks, recalls * 100, color=colour, label=name)
        marked = [k for k in (1, 5, 10) if k <= len(ks)]
        axes.plot(marked, [recalls[k - 1] * 100 for k in marked], "o", color=colour, markersize=4)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xticks([k for k in (1, 2, 5, 10, 20, 50, 100) if k <= max(num_items.values())])
    axes.minorticks_off()
    axes.set_ylim(0, 102)
    axes.set_xlabel("k")
    axes.set_ylabel("recall@k, %")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(loc="lower right", frameon=False)
    return _png(figure)


def confusion_figure(labels: Sequence[str], counts: npt.NDArray[np.integer]) -> bytes:
    """PNG of a confusion matrix; colour is the share of a row. Labels stand beside it where they are few and a font
    for them is installed, else their numbers from 0 do.

    Args:
        counts: (L, L), rows are what a picture shows, columns what it was taken for.
    Raises:
        InvalidInput: the shape does not fit the labels.
        MissingDependency: matplotlib is not installed.
    """
    number = len(labels)
    if counts.shape != (number, number) or number == 0:
        raise InvalidInput(f"confusion counts are {counts.shape}, expected ({number}, {number}), at least one label")
    side = float(np.clip(0.42 * number + 2, 4.5, 11))
    figure = _new_figure(side + 1, side)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.75, label="share of the row")
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    if number <= _MAX_NAMED:
        _name_axes(axes, labels)
    if number <= _MAX_COUNTED:
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.6 else "#1c2330"
            if count:
                axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=ink)
    return _png(figure)


def _name_axes(axes: Axes, labels: Sequence[str]) -> None:
    font = _chinese_font()
    names = [label if len(label) <= 12 else f"{label[:11]}…" for label in labels]
    places = range(len(labels))
    if font is None and not all(name.isascii() for name in names):
        axes.set_xticks(places)
        axes.set_yticks(places)
        return
    names = [name.replace("$", r"\$") for name in names]  # a dollar sign would start a formula
    axes.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=9, fontfamily=font)
    axes.set_yticks(places, names, fontsize=9, fontfamily=font)


def _chinese_font() -> str | None:
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return next((name for name in _CHINESE_FONTS if name in installed), None)


def _new_figure(width: float, height: float) -> Figure:
    """A figure of its own, not pyplot's: no global state, and no display is looked for."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("a report needs matplotlib: pip install 'tuwen[eval]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()
