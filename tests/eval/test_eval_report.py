"""The HTML report: the right misses, nothing from outside, nothing that a caption could smuggle in."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.figures import confusion_figure, recall_figure
from eval.published import PublishedRecall
from eval.report import render_retrieval_report, render_zero_shot_report, thumbnail_uri, write_retrieval_report
from eval.retrieval import EmbeddedPairs, RetrievalResult
from eval.worst import worst_misses
from tests.shapes import MemoryPairs, shape_pairs
from tuwen.embed import RetrievalSet
from tuwen.errors import InvalidInput

EVIL = "<script>alert('红')</script>&\""


def evaluated(pairs: MemoryPairs, seed: int | None = 0) -> tuple[RetrievalResult, EmbeddedPairs]:
    """Random embeddings of a set; without a seed each picture's are its own texts'."""
    chosen = RetrievalSet.of(pairs)
    images = np.eye(len(chosen.image_ids), dtype=np.float32)
    if seed is None:
        texts = np.stack([images[list(right)].sum(axis=0) for right in chosen.images_of_text])
    else:
        random = np.random.default_rng(seed)
        images, texts = (random.normal(size=(n, 8)).astype(np.float32) for n in (len(images), len(chosen.texts)))
    embedded = EmbeddedPairs(chosen, images, texts)
    scores = (embedded.scores("text_to_image"), embedded.scores("image_to_text"))
    return RetrievalResult(
        "torch", "Small", 7, EVIL, "valid", len(images), len(texts), *scores
    ), embedded  # fmt: skip


class Page(HTMLParser):
    """Tags, the sources of pictures, and the text, as a browser would take them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_worst_are_found_with_what_stood_before_them() -> None:
    """By sorting, in both directions; the best of several right answers counts."""
    pairs = shape_pairs()
    _, embedded = evaluated(pairs)
    chosen = embedded.chosen
    scores = embedded.text_embeds @ embedded.image_embeds.T
    for direction, matrix, relevant in (
        ("text_to_image", scores, chosen.images_of_text),
        ("image_to_text", scores.T, chosen.texts_of_image),
    ):
        misses = worst_misses(embedded, direction, 6)  # type: ignore[arg-type]
        places = []
        for row, right in zip(matrix, relevant, strict=True):
            order = np.argsort(-row).tolist()
            places.append(min(order.index(item) for item in right) + 1)
        assert [miss.rank for miss in misses] == sorted(places, reverse=True)[:6]
        for miss in misses:
            order = np.argsort(-matrix[miss.query]).tolist()
            assert miss.rank == places[miss.query]
            assert miss.right.item == order[miss.rank - 1]
            assert miss.right.item in relevant[miss.query]
            assert [found.item for found in miss.found] == order[:3]
            assert miss.found[0].cosine == pytest.approx(matrix[miss.query].max())


def test_a_right_answer_first_is_no_miss() -> None:
    result, embedded = evaluated(shape_pairs(), seed=None)
    assert worst_misses(embedded, "text_to_image", 10) == []
    page = Page(render_retrieval_report(result, embedded, shape_pairs()))
    assert page.text.count("Every query found a right answer first.") == 2


def test_a_report_needs_nothing_from_outside(tmp_path: Path) -> None:
    """One file: every picture is in it, and can be decoded."""
    pairs = shape_pairs()
    result, embedded = evaluated(pairs)
    write_retrieval_report(tmp_path / "deep" / "report.html", result, embedded, pairs)
    page = Page((tmp_path / "deep" / "report.html").read_text(encoding="utf-8"))
    assert len(page.sources) > 20
    for source in page.sources:
        head, _, data = source.partition(",")
        assert re.fullmatch(r"data:image/(png|webp);base64", head)
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    assert not {"script", "link", "iframe"} & set(page.tags)
    for text in ("text to image, ours", f"{result.text_to_image.r5:.1%}", "fingerprint 7"):
        assert text in page.text


def test_what_a_caption_says_stays_text() -> None:
    pairs = shape_pairs()
    pairs.texts[:] = [replace(record, text=EVIL + record.text) for record in pairs.texts]
    result, embedded = evaluated(pairs)
    html = render_retrieval_report(result, embedded, pairs)
    assert "<script" not in html
    assert Page(html).text.count(EVIL) > 20  # shown as it is written, also in the title
    labels = [EVIL, "$x^2$", "红"]
    html = render_zero_shot_report(EVIL, EVIL, labels, np.ones((3, 3), np.int64), [(EVIL, EVIL, EVIL)])
    assert "<script" not in html
    assert Page(html).text.count(EVIL) > 6


def test_published_figures_stand_below_ours() -> None:
    pairs = shape_pairs()
    result, embedded = evaluated(pairs)
    row = PublishedRecall("ViT-B-16", "MUGE", "valid", "zero_shot", "text_to_image", 0.521, 0.767, 0.844)
    page = Page(render_retrieval_report(result, embedded, pairs, {"published, zero-shot": {"text_to_image": row}}))
    assert page.text.count("published, zero-shot") == 1
    assert "52.1%76.7%84.4%71.1%" in page.text


def test_a_broken_picture_leaves_its_place_empty() -> None:
    """Of stored features the pictures may have changed since."""
    pairs = shape_pairs()
    result, embedded = evaluated(pairs)
    broken = MemoryPairs(dict.fromkeys(pairs.images, b"no picture"), pairs.texts)
    html = render_retrieval_report(result, embedded, broken)
    assert len(Page(html).sources) == 1  # the curve
    assert 'alt="picture 107"' in html
    assert thumbnail_uri(b"no picture") == ""


def test_a_thumbnail_is_small() -> None:
    """Whatever the picture's size and mode; its shape is kept."""
    file = io.BytesIO()
    Image.new("RGBA", (1200, 300), (255, 0, 0, 128)).save(file, "PNG")
    uri = thumbnail_uri(file.getvalue())
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (128, 32)
    assert len(uri) < 2000


# --- figures --------------------------------------------------------------------------------------------------------


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_a_better_curve_is_drawn_higher() -> None:
    """The blue line's mean height."""
    heights = []
    for rank in (0, 7, 90):
        image = pixels(recall_figure({"t": np.full(50, rank)}, {"t": 100}))
        is_blue = np.abs(image - (0, 0x72, 0xB2)).sum(axis=2) < 40
        heights.append(np.nonzero(is_blue)[0].mean())
    assert heights == sorted(heights)  # rows count from the top


def test_a_curve_ends_where_the_items_do() -> None:
    """Three items, and no ranks at all."""
    assert recall_figure({"t": np.array([0, 2])}, {"t": 3}).startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [1, 10, 30, 101])
def test_a_confusion_matrix_of_any_size_is_drawn(number: int, recwarn: pytest.WarningsRecorder) -> None:
    """Dark where the counts are; no warning of a missing character; labels that look like formulas are none."""
    labels = [f"$类{index}_{{$" for index in range(number)]
    image = pixels(confusion_figure(labels, np.eye(number, dtype=np.int64) * 5))
    empty = pixels(confusion_figure(labels, np.zeros((number, number), np.int64)))
    assert image.sum() < empty.sum()
    assert [str(one.message) for one in recwarn if "missing from" in str(one.message)] == []


def test_counts_must_fit_the_labels() -> None:
    with pytest.raises(InvalidInput, match=r"confusion counts are \(2, 3\), expected \(2, 2\)"):
        confusion_figure(["a", "b"], np.zeros((2, 3), np.int64))
    with pytest.raises(InvalidInput, match="at least one label"):
        confusion_figure([], np.zeros((0, 0), np.int64))


def test_the_confusions_are_listed_most_first() -> None:
    counts = np.array([[5, 3, 0], [0, 0, 9], [0, 0, 0]])
    text = Page(render_zero_shot_report("t", "s", ["甲", "乙", "丙"], counts, [("accuracy", "29.4%", "")])).text
    assert text.index("乙丙9100.0%") < text.index("甲乙337.5%")
    assert "2丙0–" in text
    assert "published" not in text
    perfect = Page(render_zero_shot_report("t", "s", ["甲", "乙"], np.eye(2, dtype=np.int64), []))
    assert "Every picture was recognised." in perfect.text
