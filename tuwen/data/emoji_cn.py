"""Emoji-CN: 1,852 concepts with Chinese names and tags, in three styles of picture; one style is held out.

    tuwen data emoji --out data/emoji_cn

From four npm packages, fetched by the user's own `npm pack` and checked by SHA-256:

| package | what | licence |
|---|---|---|
| emojibase-data | Chinese names and tags | MIT |
| emoji-datasource-google | Noto Emoji pictures, 64 px (train) | Apache-2.0 / OFL |
| @lobehub/fluent-emoji-3d | Fluent Emoji pictures, 256 px (train) | MIT |
| emoji-datasource-twitter | Twemoji pictures, 64 px (valid: the held-out style) | CC-BY-4.0 |
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tuwen.data.pairs import ImageRecord, TextRecord, jsonl_path, tsv_path, write_images, write_texts
from tuwen.errors import InvalidInput, MissingDependency, TuwenError
from tuwen.files import write_text

RESOLUTION = 64
GROUPS_NAME = "groups.tsv"
MAX_MEMBER_BYTES = 4 * 2**20  # the largest member read, the Chinese data.json, has 1 MB
_PICTURE_IDS_PER_STYLE = 10_000
# Unicode's groups by emojibase's number; source: package/meta/groups.json of emojibase-data.
GROUPS = ("smileys-emotion", "people-body", "component", "animals-nature", "food-drink", "travel-places", "activities",
          "objects", "symbols", "flags")  # fmt: skip

ProgressHook = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Package:
    """An npm package at one version; `prefix` is where its files of interest lie in the tarball."""

    name: str
    version: str
    sha256: str
    prefix: str
    licence: str

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NAMES = Package(
    "emojibase-data",
    "17.0.0",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    "package/zh/data.json",
    "MIT",
)
STYLES = (
    Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64/",
        "Apache-2.0 (Noto Emoji; its font is OFL-1.1)",
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets/",
        "MIT (Fluent Emoji)",
    ),
    Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package/img/twitter/64/",
        "CC-BY-4.0 (Twemoji, copyright Twitter, Inc and other contributors)",
    ),
)
TRAIN_STYLES, VALID_STYLES = (0, 1), (2,)


@dataclass(frozen=True)
class SplitCounts:
    """How much a split holds; a pair is one picture with one text."""

    pictures: int
    texts: int
    pairs: int


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points, Chinese name, tags other than the name, and group."""

    hexcode: str
    name: str
    tags: tuple[str, ...]
    group: str


def build_emoji_cn(
    out_dir: Path,
    packages_dir: Path,
    names: Package = NAMES,
    styles: tuple[Package, ...] = STYLES,
    on_progress: ProgressHook = lambda done, total, what: None,
) -> dict[str, int]:
    """Write the splits `train`, `valid` (the held-out style) and `seen` (train's pictures, valid's captions).

    Args:
        packages_dir: where the tarballs lie or are fetched to.
    Returns:
        Number of pictures of each split.
    Raises:
        MissingDependency: a tarball is not there and npm is not installed.
        InvalidInput: a tarball is not the pinned one.
    """
    for index, package in enumerate((names, *styles)):
        on_progress(index, len(styles) + 1, f"fetching {package.name}")
        fetch_package(package, packages_dir)
    catalogues = [_catalogue(packages_dir / style.tarball, style.prefix) for style in styles]
    concepts = _concepts(packages_dir / names.tarball, names.prefix, catalogues)
    splits = {"train": TRAIN_STYLES, "valid": VALID_STYLES, "seen": TRAIN_STYLES}
    pictures: dict[int, list[ImageRecord]] = {}
    for index, (style, catalogue) in enumerate(zip(styles, catalogues, strict=True)):
        on_progress(index, len(styles), f"drawing {style.name}")
        pictures[index] = list(_pictures(packages_dir / style.tarball, catalogue, concepts, index))
    counts: dict[str, SplitCounts] = {}
    for split, chosen in splits.items():
        captions = _captions(concepts, with_composites=split == "train")
        num_pairs = len(chosen) * sum(map(len, captions.values()))
        counts[split] = SplitCounts(len(chosen) * len(concepts), len(captions), num_pairs)
        write_images(tsv_path(out_dir, split), (record for style in chosen for record in pictures[style]))
        write_texts(jsonl_path(out_dir, split), _text_records(captions, chosen))
    write_text(out_dir / GROUPS_NAME, "".join(f"{index}\t{one.group}\n" for index, one in enumerate(concepts)))
    write_text(out_dir / "README.md", _readme(names, styles, len(concepts), counts))
    return {split: one.pictures for split, one in counts.items()}


def read_groups(folder: Path, image_ids: Iterable[int]) -> dict[int, str]:
    """The group of each picture of an Emoji-CN folder, a name of `GROUPS`.

    Raises:
        InvalidInput: no groups.tsv, or a picture without a group.
    """
    path = folder / GROUPS_NAME
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        of_concept = {int(concept): group for concept, group in lines}
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: expected lines of `concept, tab, group`; tuwen data emoji writes it") from error
    groups: dict[int, str] = {}
    for image_id in image_ids:
        group = of_concept.get(image_id % _PICTURE_IDS_PER_STYLE)
        if group not in GROUPS:
            raise InvalidInput(f"{path}: picture {image_id}: group {group!r}, known are {', '.join(GROUPS)}")
        groups[image_id] = group
    return groups


def fetch_package(package: Package, packages_dir: Path) -> Path:
    """The package's tarball, fetched by `npm pack` unless it is there.

    Raises:
        MissingDependency: npm is not installed.
        TuwenError: npm failed; its last line is quoted.
        InvalidInput: the SHA-256 is not the pinned one.
    """
    path = packages_dir / package.tarball
    if not path.is_file():
        if shutil.which("npm") is None:
            raise MissingDependency(
                f"{package.name} is fetched by npm, which is not installed; install Node.js and try again"
            )
        packages_dir.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        result = subprocess.run(command, cwd=packages_dir, capture_output=True, text=True, check=False)
        if result.returncode or not path.is_file():
            last = (result.stderr.strip() or "no message").splitlines()[-1]
            raise TuwenError(f"npm pack {package.name}@{package.version} failed: {last}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise InvalidInput(f"{path}: SHA-256 is {digest}, expected {package.sha256}; remove it and try again")
    return path


# --- reading the tarballs -------------------------------------------------------------------------------------


def _catalogue(tarball: Path, prefix: str) -> dict[str, str]:
    """Hexcode without variation selector -> member name, of every picture below `prefix`."""
    with tarfile.open(tarball) as archive:
        names = [member.name for member in archive if member.isfile() and member.name.startswith(prefix)]
    return {_bare(name.removeprefix(prefix).rsplit(".", 1)[0]): name for name in names}


def _bare(hexcode: str) -> str:
    """The packages disagree on case and on FE0F, which only asks for colour."""
    return hexcode.lower().replace("-fe0f", "")


def _concepts(tarball: Path, member_name: str, catalogues: list[dict[str, str]]) -> list[Concept]:
    """The emoji that every style draws, in the standard's order; region indicators have no group and are left out."""
    entries = json.loads(_read_members(tarball, {member_name})[member_name])
    known = [entry for entry in entries if "group" in entry and all(_bare(entry["hexcode"]) in c for c in catalogues)]
    return [
        Concept(
            _bare(entry["hexcode"]),
            entry["label"],
            _tags(entry.get("tags", []), entry["label"]),
            GROUPS[entry["group"]],
        )
        for entry in sorted(known, key=lambda entry: entry["order"])
    ]


def _tags(tags: Iterable[str], name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tag for tag in tags if tag != name))


def _read_members(tarball: Path, names: set[str]) -> dict[str, bytes]:
    """The members of these names, in one pass: going back in a compressed tarball means starting over."""
    contents: dict[str, bytes] = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            if member.name not in names:
                continue
            # A link has size 0 and would read its target, so only plain files pass.
            file = archive.extractfile(member) if member.isfile() else None
            if file is None or member.size > MAX_MEMBER_BYTES:
                raise InvalidInput(f"{tarball}: {member.name} is no plain file of at most {MAX_MEMBER_BYTES} bytes")
            contents[member.name] = file.read()
    if missing := names - contents.keys():
        raise InvalidInput(f"{tarball}: {min(missing)} is missing")
    return contents


def _pictures(
    tarball: Path, catalogue: Mapping[str, str], concepts: list[Concept], style: int
) -> Iterator[ImageRecord]:
    contents = _read_members(tarball, {catalogue[concept.hexcode] for concept in concepts})
    for index, concept in enumerate(concepts):
        yield ImageRecord(style * _PICTURE_IDS_PER_STYLE + index, _draw(contents[catalogue[concept.hexcode]]))


def _draw(encoded: bytes) -> bytes:
    """On white, 64 x 64, lossless WebP: so that no reader has to decide what transparency means."""
    picture = Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    if flat.size != (RESOLUTION, RESOLUTION):
        flat = flat.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    flat.save(file, "WEBP", lossless=True)
    return file.getvalue()


# --- captions -------------------------------------------------------------------------------------------------


def _captions(concepts: list[Concept], with_composites: bool) -> dict[str, list[int]]:
    """Text -> indices of the concepts it describes: names and tags, and for training sentences made of them."""
    captions: dict[str, list[int]] = {}
    rng = random.Random(0)
    for index, concept in enumerate(concepts):
        texts = [concept.name, *concept.tags]
        if with_composites:
            texts += _composites(concept, rng)
        for text in dict.fromkeys(texts):
            captions.setdefault(text, []).append(index)
    return captions


def _composites(concept: Concept, rng: random.Random) -> list[str]:
    first, second = (rng.choice(concept.tags), rng.choice(concept.tags)) if concept.tags else ("表情", "图标")
    name = concept.name
    return [
        f"{name}，{first}、{second}",
        f"{first}的{name}",
        f"一个{name}",
        f"{name}的表情符号",
        f"{second}{name}",
    ]


def _text_records(captions: Mapping[str, list[int]], styles: tuple[int, ...]) -> Iterator[TextRecord]:
    for text_id, (text, indices) in enumerate(captions.items()):
        ids = (style * _PICTURE_IDS_PER_STYLE + index for style in styles for index in indices)
        yield TextRecord(text_id, text, tuple(ids))


def _readme(names: Package, styles: tuple[Package, ...], num_concepts: int, counts: Mapping[str, SplitCounts]) -> str:
    sources = "".join(f"| {package.name} {package.version} | {package.licence} |\n" for package in (names, *styles))
    splits = "".join(f"| {split} | {one.pictures} | {one.texts} | {one.pairs} |\n" for split, one in counts.items())
    return (
        f"# Emoji-CN\n\n{num_concepts} emoji with their Chinese names and tags, {RESOLUTION} x {RESOLUTION} on white,"
        " made by `tuwen data emoji`.\nThe pictures are flattened and resized from these sources:\n\n"
        f"| source (npm) | licence |\n|---|---|\n{sources}\n"
        f"Picture id = {_PICTURE_IDS_PER_STYLE} * style + concept; {GROUPS_NAME} has each concept's group; styles in the"
        " order above, the last is held out as"
        " `valid`.\n`seen` holds the training pictures with the captions of `valid`.\n\n"
        f"| split | pictures | texts | pairs |\n|---|---|---|---|\n{splits}"
    )
