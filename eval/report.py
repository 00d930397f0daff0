"""One HTML file about an evaluation, with everything in it: figures beside the published ones, and pictures to look at.

Result, embeddings and pairs -> report.html; open it years later, without network.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import numpy.typing as npt

from eval.figures import confusion_figure, recall_figure
from eval.published import PublishedRecall
from eval.retrieval import DIRECTIONS, Direction, DirectionScores, EmbeddedPairs, RetrievalResult
from eval.worst import Found, Miss, worst_misses
from tuwen.data.pairs import PairSet
from tuwen.errors import InvalidInput
from tuwen.files import write_text
from tuwen.image_transform import decode_image

# Name of a row -> direction -> figures; see `eval.retrieval.published_beside`.
PublishedRecalls = Mapping[str, Mapping[Direction, PublishedRecall]]

DEFAULT_MISSES = 24  # of each direction: what a person looks through
_THUMBNAIL_SIDE = 128
_MAX_CONFUSIONS = 20
_PAGE = Template((Path(__file__).parent / "report.html.template").read_text(encoding="utf-8"))
_NAMES: dict[Direction, str] = {"text_to_image": "text to image", "image_to_text": "image to text"}


def write_retrieval_report(
    path: Path,
    result: RetrievalResult,
    embedded: EmbeddedPairs,
    pairs: PairSet,
    published: PublishedRecalls | None = None,
    num_misses: int = DEFAULT_MISSES,
) -> None:
    """The report of one evaluation.

    Args:
        published: rows to show ours beside.
    Raises:
        MissingDependency: matplotlib is not installed.
    """
    write_text(path, render_retrieval_report(result, embedded, pairs, published, num_misses))


def render_retrieval_report(
    result: RetrievalResult,
    embedded: EmbeddedPairs,
    pairs: PairSet,
    published: PublishedRecalls | None = None,
    num_misses: int = DEFAULT_MISSES,
) -> str:
    """The whole page; args and raises as `write_retrieval_report`."""
    ranks = {_NAMES[direction]: embedded.ranks[direction] for direction in DIRECTIONS}
    num_items = {_NAMES[direction]: result.of(direction).num_items for direction in DIRECTIONS}
    thumbnails = _Thumbnails(embedded, pairs)
    sections = (_misses(embedded, direction, thumbnails, num_misses) for direction in DIRECTIONS)
    identity = "" if result.fingerprint is None else f" · fingerprint {result.fingerprint}"
    return _page(
        f"Retrieval: {result.architecture} on {result.data} ({result.split})",
        f"{result.num_images:,} pictures, {result.num_texts:,} texts · through {result.engine}{identity}",
        _scores_table(result, published or {}) + _figure("Recall at k", recall_figure(ranks, num_items)),
        *sections,
    )


def write_zero_shot_report(
    path: Path,
    title: str,
    subtitle: str,
    labels: Sequence[str],
    counts: npt.NDArray[np.integer],
    figures: Sequence[tuple[str, str, str]],
) -> None:
    """The report of one classification.

    Args:
        counts: (L, L), rows are what a picture shows, columns what it was taken for.
        figures: (metric, ours, published) as they shall be read; "" where nothing is published.
    Raises:
        InvalidInput, MissingDependency: as `confusion_figure`.
    """
    write_text(path, render_zero_shot_report(title, subtitle, labels, counts, figures))


def render_zero_shot_report(
    title: str,
    subtitle: str,
    labels: Sequence[str],
    counts: npt.NDArray[np.integer],
    figures: Sequence[tuple[str, str, str]],
) -> str:
    """The whole page; args and raises as `write_zero_shot_report`."""
    header = ("", "ours", "published") if any(row[2] for row in figures) else ("", "ours")
    return _page(
        title,
        subtitle,
        _table(header, (row[: len(header)] for row in figures)),
        "<h2>What is taken for what</h2>" + _figure("Confusion matrix", confusion_figure(labels, counts)),
        _confusions(labels, counts),
        "<h2>Labels</h2>" + _label_table(labels, counts),
    )


# --- retrieval ----------------------------------------------------------------------------------------------


def _scores_table(result: RetrievalResult, published: PublishedRecalls) -> str:
    header = ("", "R@1", "R@5", "R@10", "mean", "median rank", "mean rank", "queries")
    rows = []
    for direction in DIRECTIONS:
        rows.append([f"{_NAMES[direction]}, ours", *_figures_of(result.of(direction))])
        for name, recalls in published.items():
            if direction in recalls:
                found = recalls[direction]
                percents = [f"{value:.1%}" for value in (found.r1, found.r5, found.r10, found.mean_recall)]
                rows.append([f"{_NAMES[direction]}, {name}", *percents, "", "", ""])
    return _table(header, rows)


def _figures_of(scores: DirectionScores) -> list[str]:
    percents = (f"{value:.1%}" for value in (scores.r1, scores.r5, scores.r10, scores.mean_recall))
    return [*percents, f"{scores.median_rank:,g}", f"{scores.mean_rank:,.1f}", f"{scores.num_queries:,}"]


def _misses(embedded: EmbeddedPairs, direction: Direction, thumbnails: _Thumbnails, count: int) -> str:
    misses = worst_misses(embedded, direction, count)
    if not misses:
        return f"<h2>Worst of {_NAMES[direction]}</h2><p>Every query found a right answer first.</p>"
    draw = _text_miss if direction == "text_to_image" else _image_miss
    note = (
        "Framed in green: the best right answer, and where it stands. Beside it what was found instead, with cosines."
    )
    cards = "".join(draw(miss, embedded, thumbnails) for miss in misses)
    return f"<h2>Worst of {_NAMES[direction]}</h2><p><small>{note}</small></p><div class=misses>{cards}</div>"


def _text_miss(miss: Miss, embedded: EmbeddedPairs, thumbnails: _Thumbnails) -> str:
    """A text, its picture, and the pictures found instead."""

    def item(found: Found, place: int, style: str = "") -> str:
        caption = f"#{place:,}<br>{found.cosine:.3f}"
        return f"<div class='item{style}'>{thumbnails.html(found.item)}{caption}</div>"

    instead = "".join(item(found, place) for place, found in enumerate(miss.found, start=1))
    query = escape(embedded.chosen.texts[miss.query])
    right = item(miss.right, miss.rank, " right")
    return f"<div class=miss><div class=query>{query}</div><div class=items>{right}{instead}</div></div>"


def _image_miss(miss: Miss, embedded: EmbeddedPairs, thumbnails: _Thumbnails) -> str:
    """A picture, its text, and the texts found instead."""

    def line(found: Found, place: int, style: str = "") -> str:
        text = escape(embedded.chosen.texts[found.item])
        return f"<p{style}>{text} <small>#{place:,} · {found.cosine:.3f}</small></p>"

    instead = "".join(line(found, place) for place, found in enumerate(miss.found, start=1))
    right = line(miss.right, miss.rank, " class=right")
    picture = f"<div class=asked>{thumbnails.html(miss.query)}</div>"
    return f"<div class=miss><div class=lines>{picture}<div>{right}{instead}</div></div></div>"


class _Thumbnails:
    """Small pictures of a set as data URIs, each made once."""

    def __init__(self, embedded: EmbeddedPairs, pairs: PairSet) -> None:
        self._image_ids, self._pairs = embedded.chosen.image_ids, pairs
        self._made: dict[int, str] = {}

    def html(self, index: int) -> str:
        """An <img> of the picture at that index; its id shows when the mouse rests on it."""
        if index not in self._made:
            self._made[index] = thumbnail_uri(self._pairs.image_bytes(self._image_ids[index]))
        name, uri = f"picture {self._image_ids[index]}", self._made[index]
        source = f'src="{uri}" ' if uri else ""
        return f'<img {source}alt="{name}" title="{name}" loading="lazy">'


def thumbnail_uri(encoded: bytes) -> str:
    """A picture file, scaled down to fit 128 x 128, as a data URI; "" for one that cannot be decoded.

    Stored features may belong to a picture that is broken here: the report is still worth having.
    """
    try:
        picture = decode_image(encoded).convert("RGB")  # without transparency, as the model sees it
    except InvalidInput:
        return ""
    picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


# --- zero-shot ----------------------------------------------------------------------------------------------


def _confusions(labels: Sequence[str], counts: npt.NDArray[np.integer]) -> str:
    """The pairs of labels that are confused most."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MAX_CONFUSIONS]
    pairs = [divmod(int(cell), len(labels)) for cell in order]
    rows = [
        [labels[row], labels[column], f"{wrong[row, column]:,}", f"{wrong[row, column] / counts[row].sum():.1%}"]
        for row, column in pairs
        if wrong[row, column]
    ]
    if not rows:
        return "<p>Every picture was recognised.</p>"
    return "<h2>Confused most</h2>" + _table(("is", "taken for", "pictures", "of its label"), rows, words=2)


def _label_table(labels: Sequence[str], counts: npt.NDArray[np.integer]) -> str:
    rows = []
    for number, label in enumerate(labels):
        whole = int(counts[number].sum())
        share = f"{counts[number, number] / whole:.1%}" if whole else "–"
        rows.append([str(number), label, f"{whole:,}", share])
    return _table(("number", "label", "pictures", "recognised"), rows, words=2)


# --- the page -----------------------------------------------------------------------------------------------


def _page(title: str, subtitle: str, *sections: str) -> str:
    return _PAGE.substitute(title=escape(title), subtitle=escape(subtitle), body="\n".join(sections))


def _figure(name: str, png: bytes) -> str:
    return f'<img class=figure alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """HTML; the first `words` columns are text, the others figures."""

    def cells(row: Sequence[str], tag: str) -> str:
        styles = [" class=word" if index < words else "" for index in range(len(row))]
        return "".join(f"<{tag}{style}>{escape(cell)}</{tag}>" for cell, style in zip(row, styles, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{cells(header, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"
