"""Damaged pictures and odd texts through the code that serves them: no crash, no leak, only sentences.

    make fuzz                                              # 200,000 through the models, 5,000 through a live server
    python -m perf.fuzz --inputs 200000                    # the models' code in processes of its own
    python -m perf.fuzz --live 5000 --serve                # the real server, on the sample checkpoint
    python -m perf.fuzz --seed 0 --start 4711 --inputs 1   # one input again

Exit 0: nothing found; 1: something was, each with the numbers that reproduce it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress

from perf.fuzz.judgement import judge_memory
from perf.fuzz.workers import Findings, Pool

MAX_FAILURES_SHOWN = 20
console = Console(stderr=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the models' code, or a live server.")
    parser.add_argument("--inputs", type=int, default=0, help="how many through the models' code")
    parser.add_argument("--live", type=int, default=0, help="how many through a live server")
    parser.add_argument("--serve", action="store_true", help="start the sample for --live")
    parser.add_argument("--url", default="localhost:8001", help="gRPC address for --live without --serve")
    parser.add_argument("--model", default="tiny_rn", help="what --live calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time-limit-s", type=float, default=5.0, help="CPU time an input may take")
    options = parser.parse_args()
    if options.inputs <= 0 and options.live <= 0:
        parser.error("say how many: --inputs N, --live N")
    fine = True
    if options.inputs > 0:
        indices = range(options.start, options.start + options.inputs)
        pool = Pool(options.seed, options.time_limit_s)
        fine &= _report("models", options.inputs, lambda show: pool.run(indices, options.workers, show))
    if options.live > 0:
        from perf.fuzz.live import fuzz_sample, fuzz_server

        indices = range(options.start, options.start + options.live)
        if options.serve:
            fine &= _report("live", options.live, lambda show: fuzz_sample(options.seed, indices, show))
        else:
            fine &= _report(
                "live",
                options.live,
                lambda show: fuzz_server(options.url, options.model, options.seed, indices, show),
            )
    return 0 if fine else 1


def _report(what: str, total: int, run: Callable[[Callable[[int], None]], Findings]) -> bool:
    """Runs it under a progress bar and prints what it found; whether that is nothing."""
    started = time.monotonic()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        findings = run(lambda done: progress.update(task, completed=done))
    elapsed_s = time.monotonic() - started
    print(f"{what}: {findings.outcomes.total()} inputs in {elapsed_s:.0f} s")
    for outcome, count in sorted(findings.outcomes.items(), key=lambda item: -item[1]):
        print(f"  {count:8d}  {outcome}")
    print(f"  slowest {findings.slowest_s:.2f} s, input {findings.slowest_index}")
    uses = [use for name, samples in sorted(findings.rss_mib.items()) if (use := judge_memory(name, samples))]
    for use in uses:
        print(f"  memory at start / median / end of {use}")
    for failure in findings.failures[:MAX_FAILURES_SHOWN]:
        print(f"  FAILED {failure}")
    return not findings.failures and all(use.is_flat for use in uses)


if __name__ == "__main__":
    sys.exit(main())
