"""What the Swift package's own tests go by: lines and their ids, noise and its resized pixels, a gallery.

python -m builders.ios_vectors          write clients/ios/Tests/TuwenTests/Resources
python -m builders.ios_vectors --check  say which of them differ, and exit 1
"""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from tuwen.data.pairs import open_pairs
from tuwen.files import atomic_path
from tuwen.image_transform import resize_image
from tuwen.tokenizer import default_tokenizer, normalize_text

ROOT = Path(__file__).parents[1]
RESOURCES = ROOT / "clients" / "ios" / "Tests" / "TuwenTests" / "Resources"
NUM_LINES = 1000
# Width, height, channels, side: smaller and larger, by whole numbers and not, one side untouched, thin, RGB and RGBA.
RESIZES = (
    (64, 64, 3, 64),
    (64, 48, 3, 64),
    (48, 64, 3, 64),
    (128, 128, 3, 64),
    (300, 200, 3, 64),
    (640, 480, 3, 224),
    (17, 5, 3, 64),
    (1, 1, 3, 64),
    (1, 500, 3, 64),
    (500, 1, 3, 64),
    (3, 3, 1, 64),
    (301, 199, 4, 224),
    (224, 100, 4, 224),
)
_ODD = (
    "ΣΑΣ ΟΔΟΣ Σ. ΣΣ",  # a final sigma of its own
    "Σ'Σ ΑΣ̈ ΑΣ1",
    "İstanbul IĞDIR ı",
    "“弯引号”和‘单引号’",
    "naïve café Ångström Å",
    "한국어 각 각",
    "ﬁne ﬂag ½ ² ①",
    "a\u200bb\u200cc\u200dd\ufeffe",
    "tab\tnew\nline\rreturn\u000bvertical\u000cfeed",
    "a\u2028b\u2029c\u0085d\u001ce",
    "👨‍👩‍👧‍👦 👍🏽 🇨🇳 ❤️",
    "$100 ^_^ `x` ~y~ a|b {c}",
    "[CLS] [SEP] [PAD] [UNK] [MASK] ##ing",
    "\u0301\u0301",
    "a\u0300\u0301\u0302b",
    "ｆｕｌｌ　ｗｉｄｔｈ１２３",
    "㐀㐁 𠀀𠀁 豈更 丽",
    "مرحبا بالعالم שלום",
    "नमस्ते ประเทศไทย",
    "\u0000\ufffd好\u0000",
    "x" * 200,
    "x" * 201,
    "好" * 60,
    "supercalifragilisticexpialidocious " * 9,
    "   两边   空白   ",
    "1,234.56元/kg（含税）——《红楼梦》",
    "iPhone15ProMax256GB",
    "C++11/Rust2021",
    "ǅ ǆ Ǆ",
    "ẞ ß SS",
)


def lines() -> list[str]:
    """Odd ones, real captions, and mixtures of every script there is; the same on every run."""
    captions = [record.text for record in open_pairs(ROOT / "samples" / "emoji_cn", "valid").texts]
    dice = random.Random(0)
    mixed = [_mixture(dice) for _ in range(400)]
    joined = [f"{dice.choice(captions)}{dice.choice('，。 /-')}{dice.choice(captions)}" for _ in range(170)]
    real = dice.sample(sorted(set(captions)), NUM_LINES - len(_ODD) - len(mixed) - len(joined))
    return [*_ODD, *real, *joined, *mixed]


# Letters, marks, numbers, punctuation and symbols of scripts old enough for any Unicode version that is in use.
_BLOCKS = (
    (0x21, 0x7E),
    (0xA1, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x5D0, 0x5EA),
    (0x621, 0x64A),
    (0x904, 0x939),
    (0xE01, 0xE3A),
    (0x1100, 0x1112),
    (0x1E00, 0x1EFF),
    (0x2010, 0x2027),
    (0x2100, 0x214F),
    (0x2460, 0x24FF),
    (0x3041, 0x30FF),
    (0x4E00, 0x9FA5),
    (0x4E00, 0x9FA5),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0xF900, 0xFA2D),
    (0xFF01, 0xFF5E),
    (0x1D400, 0x1D454),
    (0x1F300, 0x1F5FF),
    (0x20000, 0x2A6D6),
    (0x2F800, 0x2FA1D),
)


def _mixture(dice: random.Random) -> str:
    characters = []
    for _ in range(dice.randint(1, 40)):
        low, high = dice.choice(_BLOCKS)
        run = (chr(dice.randint(low, high)) for _ in range(dice.randint(1, 4)))
        characters += [each for each in run if unicodedata.category(each) != "Cn"]
        if dice.random() < 0.3:
            characters.append(dice.choice(" \u3000\u00a0\t"))
    return "".join(characters).strip() or "空"


def tokenizer_vectors() -> bytes:
    """A JSON list, a line each, ASCII."""
    tokenizer = default_tokenizer()
    entries = []
    for text in lines():
        ids, truncated = tokenizer.encode_checked(normalize_text(text))
        entries.append(json.dumps({"text": text, "input_ids": ids, "truncated": truncated}))
    return _list(entries)


def resize_vectors() -> bytes:
    """A JSON list of sizes, with a hash of what Pillow makes of noise; ResizeTests.swift makes the same noise."""
    entries = []
    for width, height, channels, side in RESIZES:
        noise = _noise(width * height * channels).reshape(height, width, channels)
        resized = np.stack([resize_plane(noise[..., channel], side) for channel in range(channels)], axis=-1)
        sizes = {"width": width, "height": height, "channels": channels, "side": side}
        entries.append(json.dumps(sizes | {"fnv1a": f"{_fnv1a(resized.tobytes()):x}"}))
    return _list(entries)


def resize_plane(plane: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """uint8 (R, R) of one channel (H, W): Pillow resizes every channel alike."""
    return resize_image(Image.fromarray(plane), side)[..., 0]


def gallery() -> bytes:
    """A safetensors file of four pictures, two of them alike."""
    embeds = np.array([[0.8, 0.6, 0], [0, 0.6, 0.8], [1, 0, 0], [1, 0, 0]], np.float32)
    names = json.dumps(["红苹果", "绿苹果", "红心", "红心 2"])
    # By hand, as the library writes metadata in an order of its own each time. Source: safetensors' README.
    tensor = {"dtype": "F32", "shape": embeds.shape, "data_offsets": [0, embeds.nbytes]}
    metadata = {"names": names, "fingerprint": str(2**63 - 1)}
    header = json.dumps({"__metadata__": metadata, "image_embeds": tensor}).encode("ascii")
    return len(header).to_bytes(8, "little") + header + embeds.tobytes()


def _list(entries: list[str]) -> bytes:
    return ("[\n" + ",\n".join(entries) + "\n]\n").encode("ascii")


def _noise(count: int) -> npt.NDArray[np.uint8]:
    """The high bytes of a linear congruential generator; source: Numerical Recipes, ranqd1."""
    state, values = 1, bytearray()
    for _ in range(count):
        state = (state * 1_664_525 + 1_013_904_223) % 2**32
        values.append(state >> 24)
    return np.frombuffer(bytes(values), np.uint8)


def _fnv1a(data: bytes) -> int:
    """64 bits; source: Fowler, Noll and Vo."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def rendered() -> dict[str, bytes]:
    """File name -> content, of all that is committed."""
    return {
        "tokenizer_vectors.json": tokenizer_vectors(),
        "resize_vectors.json": resize_vectors(),
        "gallery.safetensors": gallery(),
    }


def main() -> int:
    files = rendered()
    different = [name for name, data in files.items() if not _same(RESOURCES / name, data)]
    if "--check" in sys.argv[1:]:
        print("\n".join(f"{name}: run `python -m builders.ios_vectors`" for name in different))
        return bool(different)
    for name in different:
        with atomic_path(RESOURCES / name) as path:
            path.write_bytes(files[name])
        print(RESOURCES / name)
    return 0


def _same(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


if __name__ == "__main__":
    sys.exit(main())
