"""The loader: the same batches from any number of workers, corrupt pictures counted, and workers that come and go."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.shapes import MemoryPairs, shape_pairs, write_pairs
from training.batch import Batch
from training.dataset import IndexedBatches
from training.loader import Loader, Position, open_batches
from training.recipe import DataSection
from training.shards import ShardBatches
from training.sources import WeightedPairs
from tuwen.data.shards import write_shards
from tuwen.errors import InvalidInput, TuwenError

RESOLUTION = 32
pytestmark = pytest.mark.usefixtures("one_thread")


def noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(pixels.shape, generator=generator)


def loader_of(pairs: MemoryPairs, batch_size: int = 6, start: Position = (0, 0), **settings: object) -> Loader:
    data = DataSection.model_validate({"path": "unused"} | settings)
    batches = IndexedBatches([WeightedPairs(pairs)], data, RESOLUTION, batch_size, seed=0, augmentation=noise)
    return Loader(batches, data, start)


def take(loader: Loader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


@pytest.mark.parametrize("start", [(0, 0), (1, 2), (2, 3)])
def test_batches_are_the_same_for_any_number_of_workers(start: Position) -> None:
    """From any position, epoch after epoch; past the end of an epoch is the start of the next."""
    with loader_of(shape_pairs(), start=start) as inline, loader_of(shape_pairs(), start=start, num_workers=2) as other:
        first, second = take(inline, 8), take(other, 8)
    expected = [(start[0] + (start[1] + step) // 3, (start[1] + step) % 3) for step in range(8)]
    assert [(batch.epoch, batch.number) for batch in first] == expected
    for one, two in zip(first, second, strict=True):
        assert (one.epoch, one.number, one.image_ids, one.texts) == (two.epoch, two.number, two.image_ids, two.texts)
        assert torch.equal(one.pixels, two.pixels)
        assert torch.equal(one.is_readable, two.is_readable)
        assert torch.equal(one.positives.image_rows, two.positives.image_rows)  # type: ignore[union-attr]


def test_resuming_goes_on_where_it_was() -> None:
    with loader_of(shape_pairs()) as whole:
        batches = take(whole, 7)
    with loader_of(shape_pairs(), start=(1, 1)) as rest:
        assert [batch.image_ids for batch in take(rest, 3)] == [batch.image_ids for batch in batches[4:]]


def test_a_recipe_opens_sets_or_shards(tmp_path: Path) -> None:
    write_pairs(tmp_path, "train", shape_pairs())
    shards = write_shards(tmp_path, "train", tmp_path / "shards", 4)
    for data, kind in (
        (DataSection(path=tmp_path), IndexedBatches),
        (DataSection(shards=f"{shards}/*.tsv", unit="pair"), ShardBatches),
    ):
        batches = open_batches(data, RESOLUTION, 4, seed=0)
        assert isinstance(batches, kind)
        with Loader(batches, data) as loader:
            assert len(next(loader).image_ids) == 4


# --- unreadable pictures --------------------------------------------------------------------------------------------


def with_broken(*broken: int) -> MemoryPairs:
    pairs = shape_pairs()
    pairs.images.update(dict.fromkeys(broken, b"no picture"))
    return pairs


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_pictures_are_skipped_up_to_a_number(num_workers: int) -> None:
    """Each counts once, in whatever epoch it comes again; one more than allowed ends the run and is named."""
    with loader_of(with_broken(103, 111), 10, num_workers=num_workers, max_corrupt=2) as loader:
        batches = take(loader, 6)
        assert sum(int((~batch.is_readable).sum()) for batch in batches) == 6
        assert sorted(loader.unreadable) == [103, 111]
    with loader_of(with_broken(103, 111), 10, num_workers=num_workers, max_corrupt=1) as loader:
        with pytest.raises(InvalidInput, match=r"^picture (103|111) cannot be read, number 2 of .* allows 1; ") as told:
            take(loader, 2)
        assert list(loader.unreadable)[-1] == int(str(told.value).split()[1])


def test_none_are_allowed_unless_asked_for() -> None:
    with loader_of(with_broken(103), 20) as loader, pytest.raises(InvalidInput, match=r"^picture 103 cannot"):
        next(loader)


# --- workers --------------------------------------------------------------------------------------------------------


def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


def test_workers_end_with_the_loader() -> None:
    before = set(workers())
    loader = loader_of(shape_pairs(), num_workers=2)
    take(loader, 2)
    assert len(set(workers()) - before) == 2
    loader.close()
    assert set(workers()) == before
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("has_another", [False, True])
def test_a_worker_that_dies_is_one_sentence(has_another: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by `next`, not in the middle of whatever the main process does; also after another DataLoader."""
    kept = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", False)
    if has_another:
        assert len(list(DataLoader([1, 2], num_workers=1))) == 2
        assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL
    before = set(workers())
    with loader_of(shape_pairs(), num_workers=1, prefetch_batches=1) as loader:
        take(loader, 1)
        (worker,) = set(workers()) - before
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.2)
        with pytest.raises(TuwenError, match=r"^a process that reads training data died \(.*\); .*num_workers") as told:
            take(loader, 10)
    assert "\n" not in str(told.value)
    signal.signal(signal.SIGCHLD, kept)


def test_a_handler_of_the_users_stays() -> None:
    def own(number: int, frame: object) -> None:
        """Nothing."""

    kept = signal.signal(signal.SIGCHLD, own)
    with loader_of(shape_pairs(), num_workers=1) as loader:
        take(loader, 1)
        assert signal.getsignal(signal.SIGCHLD) is own
    signal.signal(signal.SIGCHLD, kept)


def test_a_signal_to_the_whole_group_is_the_main_processs_affair() -> None:
    """torchrun and Slurm send SIGTERM to all; workers that went would fail the step before the last save."""
    before = set(workers())
    with loader_of(shape_pairs(), num_workers=2, prefetch_batches=1) as loader:
        take(loader, 2)
        started = set(workers()) - before
        for name in ("-TERM", "-INT"):
            subprocess.run(["kill", name, *map(str, started)], check=True)
        time.sleep(0.2)
        take(loader, 6)
        assert set(workers()) - before == started
    assert set(workers()) == before


def test_a_worker_obeys_its_parents_signal() -> None:
    """How Python ends daemons at exit, where a loader was not closed: the process does not hang."""
    script = (
        "from tests.training.test_loader import loader_of, shape_pairs, take\n"
        "import os, multiprocessing\n"
        "loader = loader_of(shape_pairs(), num_workers=1)\n"
        "take(loader, 2)\n"
        "(worker,) = multiprocessing.active_children()\n"
        "worker.terminate()\n"
        "worker.join(60)\n"
        "print(worker.exitcode)\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
        check=False,
        env=environment,
    )
    assert (ended.returncode, ended.stdout) == (0, "0\n"), ended.stderr


def thread_count(pixels: Tensor, generator: torch.Generator) -> Tensor:
    return torch.full_like(pixels, torch.get_num_threads() / 255)


def test_workers_have_one_thread_and_leave_the_global_generator_alone() -> None:
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    data = DataSection(path=Path("unused"), num_workers=1)
    batches = IndexedBatches([WeightedPairs(shape_pairs())], data, RESOLUTION, 4, seed=0, augmentation=thread_count)
    with Loader(batches, data) as loader:
        assert (next(loader).pixels == 1).all()
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_num_threads(1)


def test_errors_of_a_worker_are_ours() -> None:
    """A batch that cannot be made raises what it would raise inline, without a worker's traceback in the sentence."""

    class Failing:
        def __len__(self) -> int:
            return 3

        def batch(self, epoch: int, number: int) -> Batch:
            raise InvalidInput("the disk is gone")

    for num_workers in (0, 1):
        data = DataSection(path=Path("unused"), num_workers=num_workers)
        with Loader(Failing(), data) as loader, pytest.raises(InvalidInput, match=r"^the disk is gone$"):
            next(loader)
