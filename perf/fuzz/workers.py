"""Inputs through the models in processes of their own: a crash or a hang is one finding, and the run goes on."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

from perf.fuzz.inputs import make_input
from perf.fuzz.judgement import BadAnswer
from perf.fuzz.models import Models
from tuwen.serving.installation import MALLOC_ARENAS

SAMPLE_EVERY = 100
_STARTUP_S = 60.0
# Time is what the machine took, and another program may have had the processor: a hang is killed only this much later.
_KILL_AFTER = 4
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True)
class Answered:
    """One input's fate. `outcome` is a class, or with `is_bad` what was wrong."""

    index: int
    outcome: str
    is_bad: bool
    cpu_s: float
    rss_mib: float | None


@dataclass
class Findings:
    """What a run found, by input number."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    rss_mib: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    slowest_s: float = 0.0
    slowest_index: int = -1

    def fail(self, seed: int, index: int, what: str) -> None:
        self.outcomes["FAILED"] += 1
        self.failures.append(f"--seed {seed} --start {index} --inputs 1: {what}")


def rss_mib(pid: int | str = "self") -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MIB


_M_ARENA_MAX = -8  # source: malloc.h


def _work(connection: Connection, seed: int, indices: range, load: Callable[[], Models]) -> None:
    # As the embedded server sets it for its model processes; else every decoding thread keeps memory of its own.
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, int(MALLOC_ARENAS))
    models = load()
    connection.send(None)
    for count, index in enumerate(indices):
        item = make_input(seed, index)
        started = time.process_time()
        try:
            outcome, is_bad = f"{item.kind}: {models.run(item)}", False
        except BadAnswer as error:
            outcome, is_bad = f"{item.format} of {len(item.data)} bytes: {error}", True
        cpu_s = time.process_time() - started
        sample = rss_mib() if count % SAMPLE_EVERY == 0 else None
        connection.send(Answered(index, outcome, is_bad, cpu_s, sample))


@dataclass
class _Worker:
    number: int
    indices: range
    process: multiprocessing.process.BaseProcess
    connection: Connection
    deadline: float


class Pool:
    """Workers that take every nth input; one that dies is replaced from the input after."""

    def __init__(self, seed: int, time_limit_s: float, load: Callable[[], Models] = Models) -> None:
        self._seed, self._time_limit_s, self._load = seed, time_limit_s, load
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def run(self, indices: range, workers: int, on_progress: Callable[[int], None] = lambda done: None) -> Findings:
        findings = Findings()
        self._workers = [self._start(number, indices[number::workers]) for number in range(workers)]
        try:
            while self._workers:
                ready = wait([worker.connection for worker in self._workers], timeout=0.2)
                for worker in list(self._workers):
                    if worker.connection in ready:
                        self._hear(worker, findings)
                    elif time.monotonic() > worker.deadline:
                        worker.process.kill()
                        limit_s = _KILL_AFTER * self._time_limit_s
                        self._replace(worker, findings, f"no answer after {limit_s:g} s, killed")
                on_progress(findings.outcomes.total())
        finally:
            for worker in self._workers:
                worker.process.kill()
        return findings

    def _start(self, number: int, indices: range) -> _Worker:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_work, args=(theirs, self._seed, indices, self._load), daemon=True, name=f"worker {number}"
        )
        process.start()
        theirs.close()  # so that its end, and not ours, is what closes the pipe
        return _Worker(number, indices, process, ours, time.monotonic() + _STARTUP_S)

    def _hear(self, worker: _Worker, findings: Findings) -> None:
        try:
            answered: Answered | None = worker.connection.recv()
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode or 0
            if not worker.indices:
                self._workers.remove(worker)
            else:
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
                self._replace(worker, findings, f"the process died of {how}")
            return
        worker.deadline = time.monotonic() + _KILL_AFTER * self._time_limit_s
        if answered is None:
            return
        worker.indices = worker.indices[1:]
        if answered.is_bad:
            findings.fail(self._seed, answered.index, answered.outcome)
        elif answered.cpu_s > self._time_limit_s:
            findings.fail(self._seed, answered.index, f"took {answered.cpu_s:.1f} s ({answered.outcome})")
        else:
            findings.outcomes[answered.outcome] += 1
        if answered.cpu_s > findings.slowest_s:
            findings.slowest_s, findings.slowest_index = answered.cpu_s, answered.index
        if answered.rss_mib is not None:
            findings.rss_mib[worker.process.name].append(answered.rss_mib)

    def _replace(self, worker: _Worker, findings: Findings, what: str) -> None:
        findings.fail(self._seed, worker.indices[0], what)
        self._workers.remove(worker)
        if rest := worker.indices[1:]:
            self._workers.append(self._start(worker.number, rest))
