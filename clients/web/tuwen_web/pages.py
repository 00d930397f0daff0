"""The HTML page of one request. The script swaps parts of it; there is no second renderer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from urllib.parse import urlencode

import jinja2

from tuwen_web.labels import EN, ZH, Labels
from tuwen_web.refusals import Refusal
from tuwen_web.searcher import MAX_LIMIT, MAX_QUERY_CHARACTERS, Found, Searcher
from tuwen_web.thumbnails import version_of
from tuwen_web.uploads import MAX_UPLOAD_BYTES

DEFAULT_LIMIT = 24
EXAMPLES = ("墨镜", "生日蛋糕", "红色的心", "吃的水果", "哭泣的猫", "时钟")

_PREPARING_REFRESH_S = 2


@dataclass(frozen=True)
class Asked:
    """What a page is for: a phrase, or a picture of the collection, or one in the request, or nothing yet."""

    labels: Labels
    has_chosen_language: bool
    limit: int
    query: str = ""
    similar: int | None = None
    is_upload: bool = False

    def address(self, *, limit: int | None = None, labels: Labels | None = None, **terms: object) -> str:
        """Of another search in the same language; or of this one, in another language or with more results."""
        query: dict[str, object] = dict(terms)
        if not terms:
            query |= {"q": self.query} if self.query else {}
            query |= {"similar": self.similar} if self.similar is not None else {}
            query |= {"limit": limit} if limit else {}
        if labels or self.has_chosen_language:
            query["lang"] = (labels or self.labels).code[:2]
        return f"/?{urlencode(query)}" if query else "/"


@dataclass(frozen=True)
class Tile:
    """A match, as it is shown."""

    name: str
    cosine: float
    small: str
    large: str
    similar: str


class Pages:
    """Renders them, everything that comes from outside as text."""

    def __init__(self, searcher: Searcher, examples: Sequence[str]) -> None:
        self._searcher, self._examples = searcher, examples
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        source = (files("tuwen_web") / "templates" / "page.html").read_text(encoding="utf-8")
        self._template = environment.from_string(source)

    def render(self, asked: Asked, found: Found | None, refusal: Refusal | None = None) -> str:
        """The whole page.

        Args:
            found: the answer; None where nothing was asked, or it was refused.
        """
        labels, searcher = asked.labels, self._searcher
        more = min(2 * asked.limit, MAX_LIMIT)
        has_more = (
            found is not None and not asked.is_upload and len(found.matches) == asked.limit and more > asked.limit
        )
        is_preparing = searcher.gallery is None
        return self._template.render(
            labels=labels,
            asked=asked,
            found=found,
            refusal=refusal,
            fill=_fill,
            heading=self._heading(asked, found),
            took=_took(labels, found) if found else "",
            tiles=[self._tile(asked, index, cosine) for index, cosine in found.matches] if found else [],
            more=asked.address(limit=more) if has_more else None,
            examples=self._examples,
            gallery=searcher.gallery,
            embedded=searcher.embedded,
            trouble=searcher.trouble,
            is_preparing=is_preparing,
            retry_after_s=_PREPARING_REFRESH_S if is_preparing else refusal.retry_after_s if refusal else None,
            other_language=EN if labels is ZH else ZH,
            max_query_characters=MAX_QUERY_CHARACTERS,
            max_upload_bytes=MAX_UPLOAD_BYTES,
        )

    def _heading(self, asked: Asked, found: Found | None) -> str:
        if found is None:
            return ""
        if asked.is_upload:
            return asked.labels.your_picture
        if asked.similar is not None:
            return _fill(asked.labels.similar_to, self._searcher.picture(asked.similar).name)
        return _fill(asked.labels.results_of, asked.query)

    def _tile(self, asked: Asked, index: int, cosine: float) -> Tile:
        picture = self._searcher.picture(index)
        address = picture_address(index, version_of(picture))
        return Tile(picture.name, cosine, address, f"{address}&size=large", asked.address(similar=index))


def _fill(label: str, *values: object) -> str:
    """A label with values for its {}; a value may hold braces of its own."""
    parts = label.split("{}")
    return "".join(part for pair in zip(parts, [*map(str, values), ""], strict=True) for part in pair)


def _took(labels: Labels, found: Found) -> str:
    if found.embed_ms is None:
        return _fill(labels.took_to_rank, f"{found.rank_ms:.1f}")
    return _fill(labels.took, f"{found.embed_ms:.1f}", f"{found.rank_ms:.1f}")


def picture_address(index: int, version: str) -> str:
    """Of its thumbnail; the version makes it another address once the file has changed."""
    return f"/pictures/{index}?v={version}"
