"""A plan on the GPU at hand, as something that runs a feed: polygraphy's runner, which copies there and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from builders.plan_gate import Feed, Run
from builders.tensorrt_plan import INSTALL, PlanFailed
from tuwen.errors import MissingDependency


@contextmanager
def open_plan(trt: ModuleType, plan_path: Path) -> Iterator[Run]:
    """Load a plan; what it yields answers with all outputs, as arrays of one's own.

    Raises:
        MissingDependency: polygraphy is not installed.
        PlanFailed: the plan is of another GPU or another TensorRT.
    """
    try:
        from polygraphy.backend.trt import TrtRunner
    except ImportError:
        raise MissingDependency(f"polygraphy, which runs a plan, is not installed: {INSTALL}") from None
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    runtime.engine_host_code_allowed = True  # a version-compatible plan holds code; it is the one we just built
    engine = runtime.deserialize_cuda_engine(plan_path.read_bytes())
    if engine is None:
        raise PlanFailed(f"{plan_path.name}: TensorRT {trt.__version__} cannot load it on this GPU")
    with TrtRunner(engine) as runner:

        def run(feed: Feed) -> Feed:
            # The runner hands out its own buffers and fills them anew with the next feed.
            return {name: array.copy() for name, array in runner.infer(feed).items()}

        yield run
