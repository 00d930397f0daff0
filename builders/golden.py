"""Golden vectors: texts and pictures with what each stage makes of them, by which a client proves itself.

    python -m builders.golden    # writes clients/golden/golden.json, from samples/emoji_tiny

clients/golden/README.md documents the file. tests/builders/test_golden_vectors.py holds it to the code.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from tuwen.checkpoint import load_checkpoint
from tuwen.fingerprint import model_fingerprint
from tuwen.image_transform import decode_image, normalize_pixels, resize_image
from tuwen.model import ChineseCLIP
from tuwen.tokenizer import MAX_TEXT_CHARS, default_tokenizer, normalize_text, pad_rows

ROOT = Path(__file__).parents[1]
GOLDEN_PATH = ROOT / "clients" / "golden" / "golden.json"
CHECKPOINT = ROOT / "samples" / "emoji_tiny"
FORMAT_VERSION = 1
RESOLUTIONS = (64, 224)
MIN_COSINE = 0.9999  # the server's float32 against PyTorch's; 0.99999 and better is what is seen
PIXEL_TOLERANCE = 1e-5  # a level of 8 bits is 0.014: this forgives the order of float32 roundings, no other pixel
_NUM_PIXEL_SAMPLES = 8

TEXTS = (
    "一只猫", "戴墨镜的笑脸", "生日蛋糕", "红色的心", "哭泣的猫", "臺灣繁體貓鳥龜", "猫", "a", "7", "！",
    "iPhone 15 Pro 手机壳", "1080P高清壁纸", "hello world", "unaffable", "naïve café", "İstanbul", "ﬁne ﬂow", "ΑΣ ΟΔΟΣ",
    "“引号”与‘单引号’", "ＡＢＣ１２３", "￥99.9（包邮）", "C++/C#", "100%纯棉 & 亚麻", "[CLS] [SEP] [UNK]", "##的",
    "😎", "👨‍👩‍👧‍👦一家人", "🇨🇳国旗👍🏽❤️", "かなカナ", "가힣", "привет 你好", "שלום", "e\u0301", "ｶﾞ",
    "  两边\u3000有\t空格\n", "零\u200b宽\ufeff字\u00ad符", "\u202e从右到左", "空\x00字符\x1f", "\ufffd",
    "𠀀𫠝𬺡", "㐀鿿豈",
    "\ue000\U000e0001", "新款" * 25, "新款" * 25 + "包", "x" * 200, "x" * 201, "高清城市夜景" * 20,
    "w " * 60, "长" * MAX_TEXT_CHARS,
)  # fmt: skip


def _photograph(width: int, height: int) -> Image.Image:
    """Gradients, edges and waves; no noise, so that the files stay small."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 / width, y * 255 / height, 127 + 120 * np.sin(x * y / 90)], axis=-1)
    rgb[height // 5 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def _encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _pictures() -> dict[str, bytes]:
    """Name -> encoded file. JPEGs stay below the size from which the server decodes them at a fraction."""
    rgb, wide = _photograph(61, 47), _photograph(120, 30)
    transparent = rgb.copy()
    transparent.putalpha(Image.fromarray((np.indices(rgb.size[::-1]).sum(0) * 2 % 256).astype(np.uint8)))
    deep = Image.fromarray((np.arange(40 * 30, dtype=np.uint16) * 54).reshape(30, 40))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # Orientation, which is ignored as in training
    return {
        "rgb.png": _encode(rgb, "PNG"),
        "rgb.bmp": _encode(_photograph(20, 16), "BMP"),
        "lossless.webp": _encode(rgb, "WEBP", lossless=True),
        "wide.png": _encode(wide, "PNG"),
        "tall.png": _encode(_photograph(24, 96), "PNG"),
        "one_pixel.png": _encode(Image.new("RGB", (1, 1), (200, 30, 90)), "PNG"),
        "gray.png": _encode(rgb.convert("L"), "PNG"),
        "palette.png": _encode(rgb.quantize(32), "PNG"),
        "palette.gif": _encode(rgb.quantize(32), "GIF"),
        "transparent.png": _encode(transparent, "PNG"),
        "sixteen_bit.png": _encode(deep, "PNG"),
        "one_bit.png": _encode(rgb.convert("1"), "PNG"),
        "rgb.jpg": _encode(rgb, "JPEG", quality=90),
        "progressive_gray.jpg": _encode(rgb.convert("L"), "JPEG", progressive=True),
        "cmyk.jpg": _encode(rgb.convert("CMYK"), "JPEG"),
        "rotated.jpg": _encode(wide, "JPEG", exif=rotated),
        "lossy.webp": _encode(rgb, "WEBP", quality=80),
    }


def describe_text(text: str) -> dict[str, Any]:
    """What tokenize_text makes of it."""
    ids, truncated = default_tokenizer().encode_checked(normalize_text(text))
    return {"text": text, "input_ids": ids, "truncated": truncated}


def describe_pixels(encoded: bytes, resolution: int) -> dict[str, Any]:
    """Checksum of the resized picture's bytes, and some of the numbers that a tower gets."""
    pixels = resize_image(decode_image(encoded), resolution)
    pixel_values = normalize_pixels(pixels)
    rng = np.random.default_rng(resolution)
    places = [[0, 0, 0], [2, resolution - 1, resolution - 1]]
    places += rng.integers(0, [3, resolution, resolution], (_NUM_PIXEL_SAMPLES - len(places), 3)).tolist()
    return {
        "rgb_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "samples": [[*place, round(float(pixel_values[tuple(place)]), 6)] for place in places],
    }


@torch.inference_mode()
def embed_ids(model: ChineseCLIP, ids: list[int]) -> npt.NDArray[np.float32]:
    """(D,) of one text, unit length."""
    row = torch.from_numpy(pad_rows([ids], len(ids)))
    return model.encode_text(row, normalize=True)[0].numpy()


@torch.inference_mode()
def embed_picture(model: ChineseCLIP, encoded: bytes) -> npt.NDArray[np.float32]:
    """(D,) of one encoded picture, unit length."""
    pixels = normalize_pixels(resize_image(decode_image(encoded), model.spec.vision.resolution))
    return model.encode_image(torch.from_numpy(pixels)[None], normalize=True)[0].numpy()


def make_golden() -> dict[str, Any]:
    model = load_checkpoint(CHECKPOINT)
    texts = [describe_text(text) for text in TEXTS]
    for text in texts:
        text["text_embeds"] = _rounded(embed_ids(model, text["input_ids"]))
    pictures = [
        {
            "name": name,
            "file": base64.b64encode(encoded).decode(),
            "pixel_values": {str(resolution): describe_pixels(encoded, resolution) for resolution in RESOLUTIONS},
            "image_embeds": _rounded(embed_picture(model, encoded)),
        }
        for name, encoded in _pictures().items()
    ]
    return {
        "format": FORMAT_VERSION,
        "model": {
            "name": model.spec.slug,
            "checkpoint": CHECKPOINT.name,
            # A string: 63 bits are more than a JSON number holds in many languages.
            "fingerprint": str(model_fingerprint(model.spec, model.state_dict())),
            "resolution": model.spec.vision.resolution,
            "embed_dim": model.spec.embed_dim,
        },
        "tolerance": {"min_cosine": MIN_COSINE, "pixel_values": PIXEL_TOLERANCE},
        "texts": texts,
        "pictures": pictures,
    }


def _rounded(embeds: npt.NDArray[np.float32]) -> list[float]:
    return [round(float(value), 6) for value in embeds]


def write_golden(path: Path = GOLDEN_PATH) -> None:
    """One text or picture a line, so that a change can be read."""
    golden = make_golden()
    parts = []
    for key, value in golden.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            parts.append(f"{json.dumps(key)}: [\n{rows}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="ascii")
    temporary.replace(path)


if __name__ == "__main__":
    write_golden()
    print(GOLDEN_PATH.relative_to(ROOT))
