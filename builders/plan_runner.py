"""A plan on the GPU at hand, as something that runs a feed: polygraphy's runner, which copies there and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from builders.feeds import Feed
from builders.plan_gate import Run
from builders.tensorrt_plan import INSTALL, PlanFailed, make_log
from tuwen.errors import MissingDependency


def require_runner() -> None:
    """
    Raises:
        MissingDependency: polygraphy is not installed.
    """
    if find_spec("polygraphy") is None:
        raise MissingDependency(f"polygraphy, which runs a plan, is not installed: {INSTALL}")


@contextmanager
def open_plan(trt: ModuleType, plan_path: Path) -> Iterator[Run]:
    """Load a plan; what it yields answers with all outputs, as arrays of one's own.

    Raises:
        MissingDependency: polygraphy is not installed.
        PlanFailed: the plan is of another GPU or another TensorRT.
    """
    require_runner()
    from polygraphy.backend.trt import TrtRunner

    log = make_log(trt)
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = True  # a version-compatible plan holds code; it is the one we just built
    engine = runtime.deserialize_cuda_engine(plan_path.read_bytes())
    if engine is None:
        raise PlanFailed(f"{plan_path.name}: TensorRT {trt.__version__} cannot load it on this GPU: {log.reason()}")
    with TrtRunner(engine) as runner:

        def run(feed: Feed) -> Feed:
            # The runner hands out its own buffers and fills them anew with the next feed.
            return {name: array.copy() for name, array in runner.infer(feed).items()}

        yield run
