"""DALI against Pillow: pixels, embeddings, damaged files, and what the guard in front of it costs.

    python -m perf.dali                 # the twin on the CPU; needs NVIDIA DALI, scikit-image and scikit-learn
    python -m perf.dali --device gpu    # nvJPEG and the resize on a GPU

For each kind of file the difference to the published transform in levels of 255: of DALI alone, and of guard and DALI,
which is what the GPU profile serves; and the least cosine of their embeddings. Then what becomes of damaged files, and
milliseconds a picture. Exits 1 where pixels or cosines miss their bounds, or DALI refuses what the guard let through.
"""

from __future__ import annotations

import io
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image

from builders.configs import MAX_BATCH_SIZE, Device
from builders.dali_pipeline import INPUT, write_pipeline
from perf.fuzz.mutations import mutate_picture
from perf.fuzz.pictures import seed_pictures
from perf.rounds import alternate, medians, milliseconds_of
from perf.workload import encode_jpeg, photographs
from tuwen.checkpoint import load_checkpoint
from tuwen.data.pairs import open_pairs
from tuwen.embed import embed_pixels
from tuwen.errors import InvalidInput
from tuwen.image_guard import guard_image
from tuwen.image_transform import preprocess_image
from tuwen.model import ChineseCLIP
from tuwen.specs import IMAGE_STD, get_spec

Pixels = npt.NDArray[np.float32]
SAMPLES = Path(__file__).parents[1] / "samples"
ROUNDS, NUM_TIMED = 5, 4  # photographs of each size and format
NUM_EMOJI = 32
NUM_EMBEDDED = 4  # of each kind: a base-size tower takes a quarter of a second for one
NUM_DAMAGED = 5000
MAX_MEAN_LEVELS, MIN_COSINE = 1.0, 0.999
COST_SIZES = ((640, 480), (2000, 1500))
_LEVELS = np.array(IMAGE_STD, np.float32)[:, None, None] * 255


class Dali:
    """The pipeline that a server runs."""

    def __init__(self, resolution: int, device: Device = "cpu", threads: int = 1) -> None:
        from nvidia.dali import Pipeline

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.dali"
            write_pipeline(resolution, path, device)
            options = {"batch_size": MAX_BATCH_SIZE, "num_threads": threads, "prefetch_queue_depth": 1}
            self._build: Callable[[], object] = partial(
                Pipeline.deserialize, path.read_bytes(), device_id=0 if device == "gpu" else None, **options
            )
        self._pipeline = self._build()

    def __call__(self, files: Sequence[bytes]) -> Pixels:
        """pixel_values float32 (N, 3, R, R).

        Raises:
            RuntimeError: DALI refuses one of the files.
        """
        try:
            self._pipeline.feed_input(INPUT, [np.frombuffer(file, np.uint8) for file in files])  # type: ignore[attr-defined]
            (pixel_values,) = self._pipeline.run()  # type: ignore[attr-defined]
            return np.array(pixel_values.as_cpu().as_array())
        except RuntimeError:
            self._pipeline = self._build()  # one that has raised answers nothing any more
            raise


def levels_off(found: Pixels, expected: Pixels) -> Pixels:
    """Of pixel_values, in levels of 255."""
    return np.abs(found - expected) * _LEVELS


def file_kinds() -> dict[str, list[bytes]]:
    """Files of each kind: photographs, emoji, and what is awkward."""
    pictures = [picture for _, picture in photographs()]
    half = [picture.resize((picture.width // 2 | 1, picture.height // 2 | 1)) for picture in pictures]
    emoji = open_pairs(SAMPLES / "emoji_cn", "valid")

    def each(format: str, convert: Callable[[Image.Image], Image.Image], **options: object) -> list[bytes]:
        return [_encode(convert(picture), format, **options) for picture in half]

    def animated(format: str) -> list[bytes]:
        turned = [picture.transpose(Image.Transpose.ROTATE_180) for picture in half]
        return [
            _encode(first, format, save_all=True, append_images=[second])
            for first, second in zip(half, turned, strict=True)
        ]

    return {
        "JPEG 4:2:0, 2000 x 1500": [encode_jpeg(picture, (2000, 1500)) for picture in pictures],
        "JPEG 4:4:4, 640 x 480": [encode_jpeg(picture, (640, 480), 0) for picture in pictures],
        "JPEG, odd size": [encode_jpeg(picture, (333, 517)) for picture in pictures],
        "JPEG, enlarged": [encode_jpeg(picture, (61, 47)) for picture in pictures],
        "JPEG, 3 x 900": [encode_jpeg(picture, (3, 900)) for picture in pictures],
        "JPEG, progressive": each("JPEG", _same, progressive=True, quality=90),
        "JPEG, grey": each("JPEG", partial(Image.Image.convert, mode="L"), quality=90),
        "JPEG, EXIF rotated": each("JPEG", _same, exif=_rotated()),
        "JPEG, RGB": each("JPEG", _same, keep_rgb=True),
        "JPEG, CMYK": each("JPEG", partial(Image.Image.convert, mode="CMYK")),
        "emoji (PNG or WebP)": [emoji.image_bytes(image_id) for image_id in emoji.image_ids[:NUM_EMOJI]],
        "PNG": each("PNG", _same),
        "PNG, transparent": each("PNG", _with_alpha),
        "PNG, palette": each("PNG", partial(Image.Image.quantize, colors=64)),
        "PNG, one bit": each("PNG", partial(Image.Image.convert, mode="1")),
        "PNG, 16 bits": each("PNG", _deep),
        "GIF, animated": animated("GIF"),
        "WebP": each("WEBP", _same),
        "WebP, animated": animated("WEBP"),
        "BMP": each("BMP", _same),
        "TIFF": each("TIFF", _same),
        "TIFF, CMYK": each("TIFF", partial(Image.Image.convert, mode="CMYK")),
        "PPM": each("PPM", _same),
    }


def _same(picture: Image.Image) -> Image.Image:
    return picture


def _with_alpha(picture: Image.Image) -> Image.Image:
    copy = picture.copy()
    copy.putalpha(Image.fromarray((np.indices(picture.size[::-1]).sum(0) * 2 % 256).astype(np.uint8)))
    return copy


def _deep(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


def _rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _encode(picture: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def each_alone(dali: Dali, files: Sequence[bytes]) -> Pixels | None:
    """What DALI makes of the files; None if it refuses one."""
    try:
        return np.concatenate([dali([file]) for file in files])
    except RuntimeError:
        return None


def report_pixels(kinds: dict[str, list[bytes]], models: dict[str, ChineseCLIP], device: Device) -> bool:
    """Whether every kind is within the bounds."""
    heads = "".join(f"  cosine {name}" for name in models)
    print(f"{'levels of 255, mean / max':26s} {'DALI alone':>16s} {'guard and DALI':>16s}{heads}")
    resolutions = {name: model.spec.vision.resolution for name, model in models.items()}
    runs = {name: Dali(resolution, device) for name, resolution in resolutions.items()}
    first, passed = next(iter(models)), True
    for kind, files in kinds.items():
        exact = {name: exact_pixels(files, resolutions[name]) for name in models}
        alone = each_alone(runs[first], files)
        served = {
            name: np.concatenate([runs[name]([guard_image(file, resolutions[name])]) for file in files])
            for name in models
        }
        cosines = [least_cosine(models[name], exact[name], served[name]) for name in models]
        told = "".join(f"{cosine:.6f}".rjust(9 + len(name)) for name, cosine in zip(models, cosines, strict=True))
        columns = (told_levels(alone, exact[first]), told_levels(served[first], exact[first]))
        print(f"{kind:26s} {columns[0]:>16s} {columns[1]:>16s}{told}", flush=True)
        mean_levels = max(float(levels_off(served[name], exact[name]).mean()) for name in models)
        passed &= mean_levels <= MAX_MEAN_LEVELS and min(cosines) >= MIN_COSINE
    return passed


def exact_pixels(files: Sequence[bytes], resolution: int) -> Pixels:
    return np.stack([preprocess_image(file, resolution) for file in files])


def told_levels(found: Pixels | None, expected: Pixels) -> str:
    if found is None:
        return "refused"
    levels = levels_off(found, expected)
    return f"{levels.mean():.2f} / {levels.max():.0f}"


def least_cosine(model: ChineseCLIP, one: Pixels, other: Pixels) -> float:
    """Of the embeddings of two (N, 3, R, R), row by row, the first few."""
    few = slice(NUM_EMBEDDED)
    pairs = zip(embed_pixels(model, iter(one[few])), embed_pixels(model, iter(other[few])), strict=True)
    return min(float(a @ b) for a, b in pairs)


def damaged_outcomes(dali: Dali, resolution: int, count: int, seed: int = 0) -> Counter[str]:
    """Damaged files, three of four of them JPEGs: what becomes of each, and of what the guard lets through."""
    rng = Random(seed)
    seeds = [*seed_pictures(), *(("JPEG", encode_jpeg(picture, (320, 240))) for _, picture in photographs())]
    jpegs = [each for each in seeds if each[0] == "JPEG"]
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        format, encoded = rng.choice(seeds if rng.randrange(4) == 0 else jpegs)
        damaged = mutate_picture(rng, format, encoded, rng.choice(seeds)[1])
        expected = _refusal_of(partial(preprocess_image, damaged, resolution, draft=True))
        found = _refusal_of(partial(guard_image, damaged, resolution))
        outcomes["other than the transform"] += found != expected
        if found:
            outcomes["refused"] += 1
            continue
        guarded = guard_image(damaged, resolution)
        outcomes["passed" if guarded == damaged else "decoded"] += 1
        outcomes["refused by DALI"] += each_alone(dali, [guarded]) is None
    return outcomes


def _refusal_of(work: Callable[[], object]) -> str:
    try:
        work()
    except InvalidInput as error:
        return str(error)
    return ""


def report_costs(resolution: int, device: Device) -> None:
    print(f"\nms a picture, R = {resolution}, one thread  guard  DALI ({device})  CPU profile")
    run = Dali(resolution, device)
    for width, height in COST_SIZES:
        for name, encode in _COST_FORMATS.items():
            rows = []
            for _, picture in islice(photographs(), NUM_TIMED):
                file = encode(picture.resize((width, height), Image.Resampling.LANCZOS))
                guarded = guard_image(file, resolution)
                sides: dict[str, Callable[[], object]] = {
                    "guard": partial(guard_image, file, resolution),
                    "dali": partial(run, [guarded]),
                    "cpu": partial(preprocess_image, file, resolution, draft=True),
                }
                found = alternate({side: milliseconds_of(work) for side, work in sides.items()}, ROUNDS)
                rows.append(list(medians(found).values()))
            guard, dali, cpu = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{name + f', {width} x {height}':34s} {guard:5.1f} {dali:11.1f} {cpu:12.1f}", flush=True)


_COST_FORMATS: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG": partial(_encode, format="JPEG", quality=90),
    "JPEG, progressive": partial(_encode, format="JPEG", quality=90, progressive=True),
    "PNG": partial(_encode, format="PNG"),
}


def main(device: Annotated[Device, typer.Option()] = "cpu") -> None:
    """DALI against Pillow."""
    torch.manual_seed(0)
    base = ChineseCLIP(get_spec("ViT-B-16")).eval()
    models = {"ViT-B-16, random": base, "sample": load_checkpoint(SAMPLES / "emoji_tiny").eval()}
    kinds = file_kinds()
    passed = report_pixels(kinds, models, device)
    for name, model in models.items():
        embeds = embed_pixels(model, iter(exact_pixels(kinds["PNG"], model.spec.vision.resolution)))
        others = (embeds @ embeds.T)[np.triu_indices(len(embeds), 1)]
        print(f"cosine of different photographs, {name}: {others.min():.3f} to {others.max():.3f}")
    outcomes = damaged_outcomes(Dali(64, device), 64, NUM_DAMAGED)
    print(f"\n{NUM_DAMAGED} damaged files: " + ", ".join(f"{count} {name}" for name, count in outcomes.items()))
    passed &= not outcomes["refused by DALI"] and not outcomes["other than the transform"]
    report_costs(base.spec.vision.resolution, device)
    if not passed:
        raise SystemExit("\nnot within the bounds")


if __name__ == "__main__":
    typer.run(main)
