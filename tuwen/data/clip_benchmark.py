"""CLIP_benchmark's retrieval sets -> pairs in TSV and JSONL, which everything here reads.

Understood, by what the file is:

- `flickr30k_test_zh.txt`, `flickr8k_test_zh.txt`: a heading, then `NAME.jpg,caption` a line, several to a picture;
- `multilingual_mscoco_captions-zh.json`, `xtd10-zh.json`, `crossmodal3600_captions-zh.json`, and `xtd200` and
  `flickr30k-200` in zho_Hans or zho_Hant: {"image_paths": [...], "annotations": [...]}, a caption each;
- the folder of a webdataset of type retrieval: `dataset_type.txt`, `SPLIT/nshards.txt`, `SPLIT/0.tar` and so on, in
  them `KEY.jpg` (or .png, .webp, .jpeg) beside `KEY.txt` with a caption a line.

Source: clip_benchmark/datasets and webdataset_builder.py of LAION-AI/CLIP_benchmark.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuwen.data.pairs import ImageRecord, TextRecord, jsonl_path, tsv_path, write_images, write_texts
from tuwen.errors import InvalidInput

_IMAGE_SUFFIXES = (".webp", ".png", ".jpg", ".jpeg")
_FLICKR_LINE = re.compile(r"(?P<name>.+?\.jpg),(?P<caption>.*)")


@dataclass(frozen=True)
class CaptionedImage:
    """A picture, where its file is or what it holds, and its captions."""

    name: str
    file: Path | bytes
    captions: tuple[str, ...]


def write_clip_benchmark_pairs(source: Path, images: Path | None, out: Path, split: str) -> tuple[int, int]:
    """Write a split of pairs; picture and text ids count from 0 in the order of the source.

    Args:
        source: an annotation file, or the folder of a webdataset.
        images: the folder of the pictures an annotation file names; default: as the file itself says, or its folder.
        split: which of a webdataset, and the name of what is written.
    Returns:
        numbers of pictures and texts.
    Raises:
        InvalidInput: the source is none of those understood, is malformed, or a picture is missing.
    """
    texts: list[TextRecord] = []
    num_images = 0

    def records() -> Iterator[ImageRecord]:
        nonlocal num_images
        for captioned in read_clip_benchmark(source, images, split):
            texts.extend(
                TextRecord(text_id, caption, (num_images,))
                for text_id, caption in enumerate(captioned.captions, start=len(texts))
            )
            yield ImageRecord(num_images, _content(captioned, source))
            num_images += 1

    write_images(tsv_path(out, split), records())
    write_texts(jsonl_path(out, split), texts)
    return num_images, len(texts)


def read_clip_benchmark(source: Path, images: Path | None, split: str) -> Iterator[CaptionedImage]:
    """The pictures of a set with their captions; arguments and errors as `write_clip_benchmark_pairs`."""
    if source.is_dir():
        found = _read_webdataset(source, split)
    elif source.suffix == ".json":
        found = _read_paths(source, images)
    elif source.suffix == ".txt":
        found = _read_flickr(source, images or source.parent)
    else:
        raise InvalidInput(f"{source}: expected a .txt or .json annotation of CLIP_benchmark, or a webdataset's folder")
    empty = True
    for captioned in found:
        if not captioned.captions:
            raise InvalidInput(f"{source}: picture {captioned.name} has no caption")
        empty = False
        yield captioned
    if empty:
        raise InvalidInput(f"{source}: empty, expected pictures with captions")


def _read_flickr(path: Path, images: Path) -> Iterator[CaptionedImage]:
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        if number == 1 or not line.strip():  # the first names the columns
            continue
        match = _FLICKR_LINE.fullmatch(line.strip())
        if match is None:
            raise InvalidInput(f"{path}:{number}: expected `NAME.jpg,caption`")
        captions.setdefault(match["name"], []).append(match["caption"])
    for name, of_image in captions.items():
        yield CaptionedImage(name, images / name, tuple(of_image))


def _read_paths(path: Path, images: Path | None) -> Iterator[CaptionedImage]:
    try:
        values = json.loads(_text_of(path))
        paths, captions = values["image_paths"], values["annotations"]
        well_formed = len(paths) == len(captions) and all(isinstance(one, str) for one in (*paths, *captions))
    except (ValueError, KeyError, TypeError):
        well_formed = False
    if not well_formed:
        raise InvalidInput(f'{path}: expected {{"image_paths": [...], "annotations": [...]}}, as many texts of each')
    for name, caption in zip(paths, captions, strict=True):
        yield CaptionedImage(name, images / Path(name).name if images else Path(name), (caption,))


def _read_webdataset(folder: Path, split: str) -> Iterator[CaptionedImage]:
    if _text_of(folder / "dataset_type.txt").strip().lower() != "retrieval":
        raise InvalidInput(f"{folder}: dataset_type.txt does not say retrieval")
    shards_text = _text_of(folder / split / "nshards.txt").strip()
    if not shards_text.isdecimal():
        raise InvalidInput(f"{folder / split}: nshards.txt says {shards_text[:20]!r}, expected a number")
    for shard in range(int(shards_text)):
        yield from _read_shard(folder / split / f"{shard}.tar")


def _read_shard(path: Path) -> Iterator[CaptionedImage]:
    """Files of one sample lie side by side, and share what comes before the first dot of their name."""
    key, picture, captions = "", b"", ""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is None:
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if folder + slash + stem != key:
                    if key:
                        yield _sample(path, key, picture, captions)
                    key, picture, captions = folder + slash + stem, b"", ""
                if f".{suffix.lower()}" in _IMAGE_SUFFIXES:
                    picture = file.read()
                elif suffix.lower() == "txt":
                    captions = file.read().decode()
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: cannot be read: {error}") from None
    if key:
        yield _sample(path, key, picture, captions)


def _sample(path: Path, key: str, picture: bytes, captions: str) -> CaptionedImage:
    if not picture:
        raise InvalidInput(f"{path}: sample {key} has no picture")
    return CaptionedImage(key, picture, tuple(captions.splitlines()))


def _content(captioned: CaptionedImage, source: Path) -> bytes:
    if isinstance(captioned.file, bytes):
        return captioned.file
    try:
        return captioned.file.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{source}: picture {captioned.file}: {error.strerror}; --images says where") from None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
