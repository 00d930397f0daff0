"""Agreement with Chinese-CLIP's own scripts, run as they are on the same features."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from eval.chinese_clip_files import IMAGE_TO_TEXT, TEXT_TO_IMAGE, Direction, Features, write_answers, write_features
from eval.predictions import predict, score
from perf.published_scripts import published_script, run_published
from tuwen.checkpoint import load_checkpoint
from tuwen.cli import app
from tuwen.data.pairs import open_pairs
from tuwen.embed import embed_pictures, embed_texts
from tuwen.errors import InvalidInput, MissingDependency

ROOT = Path(__file__).parent.parent.parent
# make_topk and evaluation scripts, and where they differ from each other in name.
SCRIPTS = {TEXT_TO_IMAGE: "", IMAGE_TO_TEXT: "_tr"}


@pytest.fixture(scope="module", autouse=True)
def _published() -> None:
    try:
        published_script("evaluation")
    except MissingDependency as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Published:
    """Feature files, annotations, and what the published scripts made of them."""

    folder: Path

    @property
    def features(self) -> tuple[Path, Path]:
        return self.folder / "valid_imgs.img_feat.jsonl", self.folder / "valid_texts.txt_feat.jsonl"

    @property
    def texts(self) -> Path:
        return self.folder / "valid_texts.jsonl"

    def annotations(self, direction: Direction) -> Path:
        return self.texts if direction == TEXT_TO_IMAGE else self.folder / "valid_texts.tr.jsonl"

    def predictions(self, direction: Direction) -> Path:
        return self.folder / f"published{SCRIPTS[direction]}.jsonl"

    def result(self, direction: Direction) -> Path:
        return self.folder / f"result{SCRIPTS[direction]}.json"

    def run(self) -> Published:
        """The whole published pipeline, both directions."""
        images, texts = self.features
        commands: list[tuple[str | Path, ...]] = [("transform_ir_annotation_to_tr", "--input", self.texts)]
        for direction, suffix in SCRIPTS.items():
            predictions = self.predictions(direction)
            commands += [
                (f"make_topk_predictions{suffix}", "--image-feats", images, "--text-feats", texts,
                 "--top-k", "10", "--eval-batch-size", "100", "--output", predictions),
                (f"evaluation{suffix}", self.annotations(direction), predictions, self.result(direction)),
            ]  # fmt: skip
        run_published(*commands)
        return self


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """200 pictures of Emoji-CN with their texts, by the sample checkpoint."""
    published = Published(tmp_path_factory.mktemp("emoji"))
    pairs = open_pairs(ROOT / "samples/emoji_cn", "valid")
    chosen = list(pairs.image_ids)[-200:]
    records = [record for record in pairs.texts if set(record.image_ids) & set(chosen)]
    model = load_checkpoint(ROOT / "samples/emoji_tiny")
    images, texts = published.features
    write_features(images, "image", [Features(np.array(chosen), embed_pictures(model, pairs, chosen))])
    text_ids = np.array([record.text_id for record in records])
    write_features(texts, "text", [Features(text_ids, embed_texts(model, [record.text for record in records]))])
    answers = ((record.text_id, sorted(set(record.image_ids) & set(chosen))) for record in records)
    write_answers(published.texts, TEXT_TO_IMAGE, answers)
    return published.run()


@pytest.fixture(scope="module")
def ties(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Small integers: sums are exact in any order, and most queries have ties that ten places cut through."""
    published = Published(tmp_path_factory.mktemp("ties"))
    random = np.random.default_rng(0)
    image_ids, text_ids = random.permutation(2000)[:250], random.permutation(3000)[:400]
    image_embeds, text_embeds = (random.integers(-1, 2, (n, 5)).astype(np.float32) for n in (250, 400))
    images, texts = published.features
    write_features(images, "image", [Features(image_ids, image_embeds)])
    write_features(texts, "text", [Features(text_ids, text_embeds)])
    # Right answers are among the 25 best, none to three of them.
    near = np.argsort(-(text_embeds @ image_embeds.T), axis=1)[:, :25]
    numbers = random.integers(0, 4, len(text_ids))
    chosen = [image_ids[random.choice(row, number, replace=False)] for row, number in zip(near, numbers, strict=True)]
    answers = zip(text_ids.tolist(), (items.tolist() for items in chosen), strict=True)
    write_answers(published.texts, TEXT_TO_IMAGE, answers)
    return published.run()


@pytest.fixture(params=["emoji", "ties"])
def published(request: pytest.FixtureRequest) -> Published:
    found: Published = request.getfixturevalue(request.param)
    return found


def run(*arguments: str | Path) -> None:
    app([str(one) for one in arguments], standalone_mode=False)


@pytest.mark.parametrize("direction", SCRIPTS)
def test_predictions_are_the_published_ones(published: Published, direction: Direction, tmp_path: Path) -> None:
    """Byte for byte."""
    out = tmp_path / "ours.jsonl"
    images, texts = published.features
    run("eval", "predict", "--image-features", images, "--text-features", texts, "--out", out,
        "--direction", f"{direction.query}-to-{direction.item}")  # fmt: skip
    assert out.read_bytes() == published.predictions(direction).read_bytes()


@pytest.mark.parametrize("direction", SCRIPTS)
def test_recalls_are_the_published_ones(published: Published, direction: Direction, tmp_path: Path) -> None:
    """To the last digit, from its predictions and from ours, with its transform of the annotations and without."""
    ours, out = tmp_path / "ours.jsonl", tmp_path / "result.json"
    predict(*published.features, direction, ours)
    for predictions in (published.predictions(direction), ours):
        for answers in (published.annotations(direction), published.texts):
            run("eval", "score", "--annotations", answers, "--predictions", predictions, "--out", out)
            assert out.read_text() == published.result(direction).read_text()
    recalls = score(published.texts, ours)
    assert 0 < recalls.r1 < recalls.r5 < recalls.r10 < 1  # else the figures could not differ


@pytest.mark.parametrize("direction", SCRIPTS)
def test_the_published_evaluation_takes_our_predictions(
    emoji: Published, ties: Published, direction: Direction, tmp_path: Path
) -> None:
    """And finds what it found in its own."""
    commands = []
    for name, published in (("emoji", emoji), ("ties", ties)):
        predict(*published.features, direction, tmp_path / f"{name}.jsonl")
        files = (published.annotations(direction), tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json")
        commands.append((f"evaluation{SCRIPTS[direction]}", *files))
    run_published(*commands)
    for name, published in (("emoji", emoji), ("ties", ties)):
        assert (tmp_path / f"{name}.json").read_text() == published.result(direction).read_text()


def test_the_transform_is_the_published_one(published: Published, tmp_path: Path) -> None:
    """Byte for byte, and back again all answers are there."""
    out = tmp_path / "reversed.jsonl"
    run("eval", "reverse", "--annotations", published.texts, "--out", out)
    assert out.read_bytes() == published.annotations(IMAGE_TO_TEXT).read_bytes()


def test_a_failure_is_told_as_the_published_evaluation_tells_it(ties: Published, tmp_path: Path) -> None:
    """`success` false and no figures, for whoever reads the result file; ours names the query."""
    lines = ties.predictions(TEXT_TO_IMAGE).read_text().splitlines(keepends=True)
    short, out, theirs = (tmp_path / name for name in ("short.jsonl", "result.json", "theirs.json"))
    short.write_text("".join(lines[:-1]))
    with pytest.raises(InvalidInput, match=r"short.jsonl: 1 of 400 queries have no prediction, text_id \d+ the first"):
        run("eval", "score", "--annotations", ties.texts, "--predictions", short, "--out", out)
    run_published(("evaluation", ties.texts, short, theirs))
    ours, published = json.loads(out.read_text()), json.loads(theirs.read_text())
    for field in ("success", "score", "scoreJson"):
        assert ours[field] == published[field]
    assert set(ours) == set(published)
