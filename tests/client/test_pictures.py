"""Pictures on the way in, and the contact sheet on the way out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tuwen_client import InvalidInput
from tuwen_client.images import encode_image_file
from tuwen_client.search import Match, Picture, contact_sheet, read_folder


def pixels(encoded: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(encoded)))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_a_picture_is_sent_without_loss_in_its_own_mode(mode: str) -> None:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8))
    picture = rgb.convert(mode)
    sent = Image.open(io.BytesIO(encode_image_file(picture)))
    assert sent.mode == mode
    assert np.array_equal(np.array(sent.convert("RGBA")), np.array(picture.convert("RGBA")))


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4)])
def test_an_array_is_sent_as_it_is(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    assert np.array_equal(pixels(encode_image_file(array)), array.squeeze() if shape[-1] == 1 else array)


@pytest.mark.parametrize("shape", [(5,), (5, 6, 2), (0, 6, 3), (2, 5, 6, 3)])
def test_an_array_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="expected uint8"):
        encode_image_file(np.zeros(shape, np.uint8))


def test_a_folder_is_read_in_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.png", "b/a.JPG", "a.webp"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "readme.md").write_text("no picture")
    assert [picture.name for picture in read_folder(tmp_path)] == ["a.webp", "b/a.JPG", "c.png"]


def test_the_contact_sheet_shows_titles_and_pictures() -> None:
    red = encode_image_file(Image.new("RGB", (30, 20), "red"))
    sheet = contact_sheet(
        ["戴墨镜的笑脸", "猫"], [[Match(Picture("red", red), 0.5)] * 3, [Match(Picture("red", red), 0.1)]]
    )
    array = np.array(sheet)
    reddish = (array[..., 0] > 200) & (array[..., 1] < 50) & (array[..., 2] < 50)
    assert reddish.sum() == pytest.approx(4 * 96 * 64, rel=0.1)
    title = array[14:50, :160]
    assert (title.max(axis=2) < 128).sum() > 100, "the title is drawn with ideographs"


def test_every_character_of_the_sample_captions_is_in_the_font() -> None:
    from PIL import ImageFont
    from tuwen_client.search import FONT_PATH

    captions = (Path(__file__).parent.parent.parent / "samples/emoji_cn/valid_texts.jsonl").read_text(encoding="utf-8")
    font = ImageFont.truetype(str(FONT_PATH), 20)
    missing = bytes(font.getmask("\U0010fffd"))
    lacking = {char for char in set(captions) if "一" <= char <= "鿿" and bytes(font.getmask(char)) == missing}
    assert not lacking
