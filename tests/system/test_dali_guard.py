"""The GPU profile's picture ensemble on the real server, DALI by its twin on the CPU: bad pictures fail alone."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException
from tuwen_client import Client

from builders import configs
from builders.dali_pipeline import write_pipeline
from tests.system.conftest import some_ports
from tests.system.test_bad_input import image_input, truncated_jpeg
from tests.test_image_guard import ORDINARY, OTHERS
from tests.test_image_transform import FILES, animation, encode, photograph, png_header
from tuwen.data.pairs import PairSet
from tuwen.image_transform import MAX_IMAGE_FRAMES
from tuwen.serving.server import EmbeddedServer, ServerError
from tuwen.specs import get_spec

pytestmark = pytest.mark.triton

SAMPLE = get_spec("Tiny-RN")
R = SAMPLE.vision.resolution
ENSEMBLE, DALI = f"{SAMPLE.slug}_image", f"preprocess_image_{R}"
PROFILE = "twin"
Answer = npt.NDArray[np.float32] | InferenceServerException
# What `python -m perf.dali` asks of DALI's pixels.
MIN_COSINE = 0.999


def spliced_jpeg() -> bytes:
    """In its middle another file begins."""
    encoded = encode(photograph(), "JPEG")
    return encoded[: len(encoded) // 2] + encoded


def corrupt_png() -> bytes:
    encoded = bytearray(FILES["rgb png"])
    middle = len(encoded) // 2
    encoded[middle : middle + 40] = bytes(40)
    return bytes(encoded)


AVIF = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(500)
BAD = {
    "truncated": (truncated_jpeg(), "cannot be decoded: .*truncated"),
    "JPEG corrupt half-way": (spliced_jpeg(), "cannot be decoded"),
    "PNG corrupt half-way": (corrupt_png(), "cannot be decoded"),
    "empty": (b"", "image is empty|0"),
    "AVIF": (AVIF, "not a readable picture file"),
    "too many pixels": (png_header(20_000, 20_000), "pixels, the limit"),
    "too long a side": (encode(Image.new("L", (70_000, 1)), "PNG"), "the limit of a side"),
    "too many frames": (animation("PNG", MAX_IMAGE_FRAMES + 1), "1001 frames, the limit"),
}
PAGE = b"<!doctype html><title>404</title>"
AWKWARD = {
    **OTHERS,
    **{f"animated {format}": animation(format, 3) for format in ("GIF", "PNG", "WEBP", "TIFF")},
    "cmyk tiff": encode(photograph().convert("CMYK"), "TIFF"),
    "plain ppm": b"P3 3 2 255 " + b"12 200 7 " * 6,
}


@pytest.fixture(scope="module")
def twin_repository(sample_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's, with a profile beside it: guard, DALI's twin, tower."""
    pytest.importorskip("nvidia.dali")
    repository = tmp_path_factory.mktemp("twin") / "model_repository"
    shutil.copytree(sample_repository, repository)
    for model in (configs.dali_preprocess(R, "cpu"), configs.guarded_image_ensemble(SAMPLE, SAMPLE.slug)):
        profile = repository / model.name / "configs" / f"{PROFILE}.pbtxt"
        profile.parent.mkdir(exist_ok=True)  # the GPU's own is there
        profile.write_text(configs.render(model))
    write_pipeline(R, repository / DALI / "1" / "model.dali", "cpu")
    return repository


def serve(repository: Path) -> EmbeddedServer:
    ports = some_ports()
    return EmbeddedServer(
        repository,
        models=[ENSEMBLE],
        grpc_port=ports.grpc,
        http_port=ports.http,
        metrics_port=ports.metrics,
        model_config_name=PROFILE,
    )


@pytest.fixture(scope="module")
def twin_server(twin_repository: Path) -> Iterator[EmbeddedServer]:
    with serve(twin_repository) as server:
        yield server


@pytest.fixture
def raw(twin_server: EmbeddedServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(twin_server.endpoints.grpc) as one:
        yield one


def ask(raw: triton.InferenceServerClient, model: str, output: str, files: Sequence[bytes]) -> list[Answer]:
    """All at the same time; in order, an answer or an error each."""
    futures: list[Future[Answer]] = [Future() for _ in files]

    def keep(future: Future[Answer], result: triton.InferResult, error: InferenceServerException | None) -> None:
        future.set_result(error or result.as_numpy(output)[0])

    for future, file in zip(futures, files, strict=True):
        raw.async_infer(
            model, [image_input(file)], callback=lambda result, error, future=future: keep(future, result, error)
        )
    return [future.result(timeout=60) for future in futures]


def embed(raw: triton.InferenceServerClient, files: Sequence[bytes]) -> list[Answer]:
    return ask(raw, ENSEMBLE, "image_embeds", files)


def rows_of(answers: Sequence[Answer]) -> npt.NDArray[np.float32]:
    assert not [answer for answer in answers if isinstance(answer, InferenceServerException)]
    return np.stack(answers)


@pytest.fixture(scope="module")
def good(sample_pairs: PairSet) -> list[bytes]:
    """56: every awkward kind that the contract accepts, the ordinary JPEGs, and emoji, half of them as JPEG."""
    files = [*AWKWARD.values(), *ORDINARY.values()]
    emoji = [sample_pairs.image_bytes(image_id) for image_id in sample_pairs.image_ids[: 56 - len(files)]]
    assert len(emoji) >= 10
    emoji[::2] = [encode(Image.open(io.BytesIO(one)).convert("RGB"), "JPEG", quality=90) for one in emoji[::2]]
    return [*files, *emoji]


def test_the_profile_is_what_is_served(raw: triton.InferenceServerClient) -> None:
    """Triton falls back to config.pbtxt where a profile is missing, and says nothing."""
    assert raw.get_model_config(DALI).config.backend == "dali"
    steps = raw.get_model_config(ENSEMBLE).config.ensemble_scheduling.step
    assert [step.model_name for step in steps] == [f"guard_image_{R}", DALI, f"{SAMPLE.slug}_image_tower"]


def test_8_bad_pictures_of_64_fail_alone_and_the_next_64_are_answered(
    raw: triton.InferenceServerClient, client: Client, good: list[bytes]
) -> None:
    alone = np.concatenate([rows_of(embed(raw, [file])) for file in good])
    files: list[bytes] = list(good)
    at = {}
    for index, (name, (file, _)) in enumerate(BAD.items()):
        at[8 * index + 3] = name
        files.insert(8 * index + 3, file)
    before = runs_of(raw, DALI)
    answers = embed(raw, files)
    runs, items = (after - earlier for after, earlier in zip(runs_of(raw, DALI), before, strict=True))
    assert items == 56, "a bad file never reaches DALI"
    assert runs < items, "they were batch-mates"

    rows = rows_of([answer for index, answer in enumerate(answers) if index not in at])
    assert np.allclose(rows, alone, atol=1e-5)
    cpu_profile = np.asarray(client.embed_images(good))
    assert (rows * cpu_profile).sum(axis=1).min() >= MIN_COSINE
    for index, name in at.items():
        answer = answers[index]
        assert isinstance(answer, InferenceServerException), name
        assert answer.status() == "StatusCode.INVALID_ARGUMENT"
        assert "/" not in answer.message()
        with pytest.raises(InferenceServerException, match=BAD[name][1]):
            raise answer

    again = rows_of(embed(raw, [*good, *good[:8]]))
    assert np.allclose(again, np.concatenate([alone, alone[:8]]), atol=1e-5)


def runs_of(raw: triton.InferenceServerClient, model: str) -> tuple[int, int]:
    """Batches that the model has computed, and requests in them."""
    (stats,) = raw.get_inference_statistics(model).model_stats
    return stats.execution_count, stats.inference_count


@pytest.mark.parametrize("name", AWKWARD)
def test_what_the_guard_decodes_is_answered_as_without_a_gpu(
    name: str, raw: triton.InferenceServerClient, client: Client, good: list[bytes]
) -> None:
    (answer, *_) = embed(raw, [AWKWARD[name], *good[-7:]])
    expected = client.embed_images([AWKWARD[name]])[0]
    assert not isinstance(answer, InferenceServerException)
    assert np.allclose(answer, expected, atol=1e-4)


def test_without_the_guard_a_corrupt_file_fails_alone_and_the_pipeline_lives_on(
    raw: triton.InferenceServerClient,
) -> None:
    """What the embedded backend does; Triton's own fails the whole batch."""
    files = [*ORDINARY.values()] * 2
    expected = rows_of(ask(raw, DALI, "pixel_values", files))
    for bad in (truncated_jpeg(), PAGE):
        answers = ask(raw, DALI, "pixel_values", [*files[:5], bad, *files[5:]])
        refused = answers.pop(5)
        assert isinstance(refused, InferenceServerException)
        assert "image cannot be decoded by DALI" in refused.message()
        assert np.array_equal(rows_of(answers), expected)
    assert np.array_equal(rows_of(ask(raw, DALI, "pixel_values", files)), expected)


def test_several_pictures_in_one_request(raw: triton.InferenceServerClient) -> None:
    """One that the guard decodes beside one that it lets through: padded to one length."""
    names = ("palette", "4:2:0")
    files = [(FILES | ORDINARY)[name] for name in names]
    rows = np.zeros((2, max(map(len, files))), np.uint8)
    for row, file in zip(rows, files, strict=True):
        row[: len(file)] = np.frombuffer(file, np.uint8)
    request = triton.InferInput("image", list(rows.shape), "UINT8").set_data_from_numpy(rows)
    found = raw.infer(ENSEMBLE, [request]).as_numpy("image_embeds")
    assert np.allclose(found, rows_of([answer for file in files for answer in embed(raw, [file])]), atol=1e-5)


def test_the_gpus_pipeline_is_refused_on_a_machine_without_one(twin_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "model_repository"
    shutil.copytree(twin_repository, repository)
    write_pipeline(R, repository / DALI / "1" / "model.dali", "gpu")
    with pytest.raises(ServerError, match="not a pipeline that DALI runs on the CPU"), serve(repository):
        pass
