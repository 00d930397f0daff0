"""Emoji-CN from tarballs of a few drawn pictures with the packages' own structure; the real ones are `slow`."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

import tuwen.data.emoji_cn as emoji_cn
from tuwen.data.emoji_cn import NAMES, STYLES, Package, build_emoji_cn, fetch_package, read_groups
from tuwen.data.lmdb import write_lmdb
from tuwen.data.pairs import iter_images, iter_texts, jsonl_path, open_pairs, tsv_path
from tuwen.errors import InvalidInput, MissingDependency, TuwenError

# Not in the order of `order`; the packages disagree on case and FE0F; C has no twitter picture, R no group.
ENTRIES = [
    {"label": "火车", "hexcode": "1F682", "tags": ["交通", "铁路"], "order": 30, "group": 5},
    {"label": "猫脸", "hexcode": "1F431", "tags": ["猫", "宠物", "猫脸"], "order": 10, "group": 3},
    {"label": "心", "hexcode": "2764-FE0F", "tags": ["宠物"], "order": 20, "group": 8},
    {"label": "无此图", "hexcode": "1FAE9", "tags": ["缺"], "order": 40, "group": 0},
    {"label": "区域指标 A", "hexcode": "1F1E6"},
]
FILES = (("1f682", "1f431", "2764", "1fae9", "1f1e6"), ("1F682", "1f431", "2764-fe0f", "1fae9", "1f1e6"),
         ("1f682", "1f431", "2764-fe0f", "1f1e6"))  # fmt: skip
COLOURS = {"1f682": (10, 20, 30), "1f431": (200, 100, 0), "2764": (255, 0, 0), "1fae9": (1, 1, 1), "1f1e6": (2, 2, 2)}
CONCEPTS = ["1f431", "2764", "1f682"]  # by order


def draw(colour: tuple[int, int, int], side: int, kind: str) -> bytes:
    """Left half opaque, right half transparent black: white only if it is composited."""
    picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    picture.paste((*colour, 255), (0, 0, side // 2, side))
    file = io.BytesIO()
    picture.save(file, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    return file.getvalue()


def pack(path: Path, members: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> str:
    """Write a tarball as npm does; returns its SHA-256."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A folder of tarballs, and the tables that pin them."""

    folder: Path
    names: Package
    styles: tuple[Package, ...]

    def build(self, out_dir: Path) -> dict[str, int]:
        return build_emoji_cn(out_dir, self.folder, self.names, self.styles)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    folder = tmp_path / "npm"
    folder.mkdir()
    data = json.dumps(ENTRIES).encode()
    others = {"package/package.json": b"{}", "package/en/data.json": b"[]"}
    names = replace(NAMES, sha256=pack(folder / NAMES.tarball, others | {NAMES.prefix: data}))
    styles = []
    for style, hexcodes in zip(STYLES, FILES, strict=True):
        side, kind = (256, "WEBP") if "fluent" in style.name else (64, "PNG")
        members = {
            f"{style.prefix}{code}.{kind.lower()}": draw(COLOURS[code.lower().replace("-fe0f", "")], side, kind)
            for code in hexcodes
        }
        styles.append(replace(style, sha256=pack(folder / style.tarball, others | members)))
    return Source(folder, names, tuple(styles))


def captions(out_dir: Path, split: str) -> dict[str, tuple[int, ...]]:
    return {record.text: record.image_ids for record in iter_texts(jsonl_path(out_dir, split))}


def test_splits_hold_the_concepts_drawn_in_every_style(source: Source, tmp_path: Path) -> None:
    assert source.build(tmp_path / "out") == {"train": 6, "valid": 3, "seen": 6}
    ids = {
        split: [record.image_id for record in iter_images(tsv_path(tmp_path / "out", split))]
        for split in ("train", "valid", "seen")
    }
    seen_styles = [0, 1, 2, 10000, 10001, 10002]
    assert ids == {"train": seen_styles, "valid": [20000, 20001, 20002], "seen": seen_styles}


def test_names_and_tags_describe_every_picture_of_theirs(source: Source, tmp_path: Path) -> None:
    source.build(tmp_path)
    expected = {"猫脸": [0], "猫": [0], "宠物": [0, 1], "心": [1], "火车": [2], "交通": [2], "铁路": [2]}
    assert captions(tmp_path, "valid") == {text: tuple(20000 + i for i in ids) for text, ids in expected.items()}
    assert captions(tmp_path, "seen") == {
        text: tuple(style + i for style in (0, 10000) for i in ids) for text, ids in expected.items()
    }


def test_train_adds_sentences(source: Source, tmp_path: Path) -> None:
    source.build(tmp_path)
    train, seen = captions(tmp_path, "train"), captions(tmp_path, "seen")
    assert {text: train[text] for text in seen} == seen
    assert train["一个火车"] == train["火车的表情符号"] == (2, 10002)
    assert len(train) >= len(seen) + 4 * len(CONCEPTS)


def test_texts_are_unique_and_only_the_held_out_style_is_valid(source: Source, tmp_path: Path) -> None:
    source.build(tmp_path)
    for split, styles in {"train": {0, 1}, "seen": {0, 1}, "valid": {2}}.items():
        records = list(iter_texts(jsonl_path(tmp_path, split)))
        assert len({record.text for record in records}) == len(records)
        assert {image_id // 10000 for record in records for image_id in record.image_ids} == styles


def test_pictures_are_64_pixels_on_white(source: Source, tmp_path: Path) -> None:
    source.build(tmp_path)
    for split in ("train", "valid"):
        for record in iter_images(tsv_path(tmp_path, split)):
            picture = Image.open(io.BytesIO(record.encoded))
            assert (picture.size, picture.mode) == ((64, 64), "RGB")
            assert picture.getpixel((10, 32)) == COLOURS[CONCEPTS[record.image_id % 10000]]  # lossless
            assert picture.getpixel((54, 32)) == (255, 255, 255)


def test_every_picture_has_its_group(source: Source, tmp_path: Path) -> None:
    source.build(tmp_path)
    expected = {0: "animals-nature", 1: "symbols", 2: "travel-places"}
    for split, style in (("valid", 20000), ("train", 0), ("seen", 10000)):
        image_ids = open_pairs(tmp_path, split).image_ids
        groups = read_groups(tmp_path, image_ids)
        assert {concept: groups[style + concept] for concept in expected} == expected
    with pytest.raises(InvalidInput, match=r"groups\.tsv: picture 3: group None"):
        read_groups(tmp_path, [3])
    with pytest.raises(InvalidInput, match=r"nowhere/groups\.tsv: expected lines"):
        read_groups(tmp_path / "nowhere", [0])


def test_two_builds_are_the_same_bytes(source: Source, tmp_path: Path) -> None:
    for name in ("one", "two"):
        source.build(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_set_can_be_packed_and_opened(source: Source, tmp_path: Path) -> None:
    source.build(tmp_path)
    for split in ("train", "valid", "seen"):
        write_lmdb(tmp_path, split)
        assert len(open_pairs(tmp_path, split).image_ids) == len(list(iter_images(tsv_path(tmp_path, split))))


def test_the_readme_names_licences_and_counts(source: Source, tmp_path: Path) -> None:
    source.build(tmp_path)
    readme = (tmp_path / "README.md").read_text("utf-8")
    for said in ("MIT", "Apache-2.0", "OFL", "CC-BY-4.0", "Twitter, Inc", "3 emoji", "| valid | 3 | 7 | 8 |"):
        assert said in readme
    assert all(f"{one.name} {one.version}" in readme for one in (source.names, *source.styles))


def test_progress_names_what_is_going_on(source: Source, tmp_path: Path) -> None:
    told: list[str] = []
    build_emoji_cn(tmp_path, source.folder, source.names, source.styles, lambda done, total, what: told.append(what))
    assert [what.split()[0] for what in told] == ["fetching"] * 4 + ["drawing"] * 3


# --- what is refused ----------------------------------------------------------------------------------------


def test_another_tarball_is_refused(source: Source, tmp_path: Path) -> None:
    with open(source.folder / source.styles[2].tarball, "ab") as file:
        file.write(b"x")
    with pytest.raises(InvalidInput, match=r"emoji-datasource-twitter-16\.0\.0\.tgz: SHA-256 is .*expected"):
        source.build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_member_that_is_too_large_is_refused(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji_cn, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(InvalidInput, match=r"package/zh/data\.json is no plain file of at most 100 bytes"):
        source.build(tmp_path)


def test_a_link_in_a_tarball_is_refused(source: Source, tmp_path: Path) -> None:
    members, links = {"package/big.json": json.dumps(ENTRIES).encode()}, {NAMES.prefix: "../big.json"}
    digest = pack(source.folder / NAMES.tarball, members, links)
    with pytest.raises(InvalidInput, match=r"package/zh/data\.json is no plain file"):
        replace(source, names=replace(NAMES, sha256=digest)).build(tmp_path)


def test_a_tarball_without_the_names_is_refused(source: Source, tmp_path: Path) -> None:
    digest = pack(source.folder / NAMES.tarball, {"package/package.json": b"{}"})
    with pytest.raises(InvalidInput, match=r"emojibase-data-17\.0\.0\.tgz: package/zh/data\.json is missing"):
        replace(source, names=replace(NAMES, sha256=digest)).build(tmp_path)


# --- npm ----------------------------------------------------------------------------------------------------

FAKE_NPM = """#!/bin/sh
echo "$@" >> {log}
{action}
"""


def fake_npm(folder: Path, action: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an `npm` on the PATH that logs its arguments and runs `action` in the cache folder."""
    log = folder / "calls"
    (folder / "npm").write_text(FAKE_NPM.format(log=log, action=action))
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return log


@pytest.fixture
def package(tmp_path: Path) -> Package:
    digest = hashlib.sha256(b"tarball").hexdigest()
    return Package("@scope/thing", "1.2.3", digest, "package/", "MIT")


def test_a_missing_tarball_is_packed_by_npm_once(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fake_npm(tmp_path, "printf tarball > scope-thing-1.2.3.tgz", monkeypatch)
    for _ in range(2):
        assert fetch_package(package, tmp_path / "cache").read_bytes() == b"tarball"
    assert log.read_text() == "pack --silent @scope/thing@1.2.3\n"


def test_what_npm_fetched_is_checked_too(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path, "printf other > scope-thing-1.2.3.tgz", monkeypatch)
    with pytest.raises(InvalidInput, match=r"scope-thing-1\.2\.3\.tgz: SHA-256 is"):
        fetch_package(package, tmp_path / "cache")


@pytest.mark.parametrize("action", ["echo first >&2; echo 'no such version' >&2; exit 1", "echo 'no such version' >&2"])
def test_npm_failing_is_a_sentence(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    fake_npm(tmp_path, action, monkeypatch)
    with pytest.raises(TuwenError, match=r"^npm pack @scope/thing@1\.2\.3 failed: no such version$"):
        fetch_package(package, tmp_path / "cache")


def test_npm_missing_is_a_sentence(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="@scope/thing is fetched by npm, which is not installed"):
        fetch_package(package, tmp_path / "cache")


# --- the real packages --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_set(tmp_path: Path) -> None:
    packages_dir = Path(os.environ.get("TUWEN_NPM_PACKAGES", ".cache/npm"))
    if not all((packages_dir / package.tarball).is_file() for package in (NAMES, *STYLES)):
        pytest.skip(f"the four npm packages are not in {packages_dir}; `tuwen data emoji` fetches them")
    assert build_emoji_cn(tmp_path, packages_dir) == {"train": 3704, "valid": 1852, "seen": 3704}
    valid = list(iter_texts(jsonl_path(tmp_path, "valid")))
    assert (len(valid), sum(len(record.image_ids) for record in valid)) == (5942, 9835)
    assert len(list(iter_texts(jsonl_path(tmp_path, "train")))) == 15201
