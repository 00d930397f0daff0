"""What the page shows is bounded as what the server embeds: one set of numbers, though neither imports the other."""

from __future__ import annotations

import asyncio

import pytest
from PIL import Image
from tuwen_client.search import Picture
from tuwen_web.refusals import Refusal
from tuwen_web.thumbnails import FORMATS, MAX_PIXELS, Thumbnails

from tuwen.image_transform import IMAGE_FORMATS, MAX_IMAGE_PIXELS


def test_the_page_s_limits_are_the_server_s() -> None:
    assert FORMATS == IMAGE_FORMATS
    assert MAX_PIXELS == MAX_IMAGE_PIXELS
    Thumbnails()
    assert MAX_IMAGE_PIXELS // 2 == Image.MAX_IMAGE_PIXELS


def test_whatever_a_decoder_raises_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("a decoder's slip")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(Refusal, match="cannot be shown"):
        asyncio.run(Thumbnails().get(Picture("a", b"a"), "small"))
