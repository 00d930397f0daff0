"""Parts of features by Ray Data: actors that each open the engine once, here or on the machines of a cluster.

    tuwen features --engine ray --checkpoint samples/emoji_tiny --data samples/emoji_cn --out features

With RAY_ADDRESS set it is that cluster's machines that embed. They need the same checkout and environment, and the
input and the checkpoint under the same paths; the parts come back to this process, which writes them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from eval.engine import Engine
from eval.feature_files import Manifest
from eval.feature_sources import Source
from eval.features import EmbedParts, EngineChoice, ItemsHook, embed_part
from tuwen.errors import InvalidInput, MissingDependency, TuwenError


class PartEmbedder:
    """An actor: the number of a part in; its file's content out, or why there is none."""

    def __init__(self, choice: EngineChoice, source: Source, manifest: Manifest) -> None:
        self._choice, self._source, self._manifest = choice, source, manifest
        self._engine: Engine | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        number = int(batch["number"][0])
        content, error = b"", ""
        try:
            content = embed_part(self._opened(), self._source, self._manifest, number)
        except TuwenError as reason:  # raised, it would come out as a page about Ray
            error = str(reason)
        return {"number": np.array([number]), "content": np.array([content], object), "error": np.array([error])}

    def _opened(self) -> Engine:
        """The engine, opened at the first part, so that its errors are that part's."""
        if self._engine is None:
            engine = self._choice.open()
            if engine.fingerprint != self._manifest.fingerprint:
                raise InvalidInput(f"{self._choice.checkpoint}: is another model on another machine")
            self._engine = engine
        return self._engine


def parts_by_ray(choice: EngineChoice, num_workers: int | None = None) -> EmbedParts:
    """Parts as they are ready, by actors.

    Args:
        choice: of the engine in each actor.
        num_workers: how many actors; default: one a GPU for a cuda device, else one a machine.
    Raises:
        MissingDependency: Ray is not installed.
        InvalidInput: an actor cannot open the engine or read the input.
    """

    def embed_parts(
        source: Source, manifest: Manifest, numbers: list[int], on_items: ItemsHook
    ) -> Iterator[tuple[int, bytes]]:
        if not numbers:
            return
        with _connected() as ray:
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            workers, num_cpus, num_gpus = shares(machines, choice.device, num_workers)
            parts = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
            embedded = parts.map_batches(
                PartEmbedder,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                fn_constructor_args=(choice, source, manifest),
            )
            for row in embedded.iter_rows():
                if row["error"]:
                    raise InvalidInput(row["error"])
                yield int(row["number"]), row["content"]

    return embed_parts


@contextmanager
def _connected() -> Iterator[ModuleType]:
    """Ray with ray.data, connected to RAY_ADDRESS or started here, and let go of afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependency(f"--engine ray needs Ray Data ({error}): pip install 'tuwen[ray]'") from None
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:  # as it does where nothing answers, or another Ray
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(f"--engine ray: RAY_ADDRESS is {os.environ.get('RAY_ADDRESS')!r}: {reason}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours is shown
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


def shares(machines: Sequence[Mapping[str, float]], device: str, num_workers: int | None) -> tuple[int, int, int]:
    """(actors, CPUs of each, GPUs of each), so that each fits on the smallest machine.

    Ray gives an actor's numerical libraries as many threads as it has CPUs.

    Args:
        machines: {"CPU", "GPU", ...} of each; a head without CPUs takes no part.
    Raises:
        InvalidInput: a cuda device is asked for, and no machine has a GPU.
    """
    on_gpu = device.startswith("cuda")
    usable = [one for one in machines if one.get("CPU", 0) >= 1 and (not on_gpu or one.get("GPU", 0) >= 1)]
    if not usable:
        raise InvalidInput(f"--engine ray: no machine of the cluster has a {'GPU' if on_gpu else 'CPU'}")
    num_gpus = sum(int(one.get("GPU", 0)) for one in usable)
    workers = num_workers or (num_gpus if on_gpu else len(usable))
    to_a_machine = -(-workers // len(usable))
    return workers, max(1, int(min(one["CPU"] for one in usable)) // to_a_machine), int(on_gpu)
