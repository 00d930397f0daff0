"""What a client sees when parts of a server die, hang or run out of memory, and how soon all is well again.

    make bench-faults                       # ViT-B-16, random weights, under the supervisor of `tuwen serve`

Texts, pictures and similarity requests are sent without pause, by clients that do not retry; each answer is compared
with the right one. Beside them a client that retries patiently embeds texts, as a program would.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tuwen_client import Client, RetryPolicy, TuwenError

from perf.processes import descendants
from perf.rounds import machine, write_json
from perf.serving import BENCH_DIR, FP32, bench_repository
from perf.workload import encode_jpeg, muge_like_texts, photographs
from tuwen.serving.ports import free_ports
from tuwen.serving.server import EmbeddedServer
from tuwen.serving.supervisor import Supervisor

MIN_COSINE = 0.9999
PAUSE_S = 5.0
QUIET_S = 3.0  # without a failure: then it is over
MAX_FAULT_S = 60.0
_TIMEOUT_S = 20.0
_PATIENT = RetryPolicy(attempts=30)  # as the documentation advises those who would rather wait than fail
_SHM_MIB = 256
_INSIDE = "TUWEN_FAULTS_SHM"

Ask = Callable[[Client], float]  # asks one thing; returns the answer's worst cosine with the right one


@dataclass
class Event:
    """One request of the stream: seconds since its start, and what it brought."""

    kind: str
    sent_at: float
    ended_at: float
    outcome: str

    @property
    def is_bad(self) -> bool:
        """Failed, or took so long that something else must have."""
        return self.outcome != "right" or self.ended_at - self.sent_at > QUIET_S


@dataclass
class Stream:
    """Requests without pause, from one thread a kind."""

    url: str
    asks: dict[str, Ask]
    events: list[Event] = field(default_factory=list)
    retried: Counter[str] = field(default_factory=Counter)
    wrong: int = 0

    def __post_init__(self) -> None:
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            *(threading.Thread(target=self._run, args=(kind, ask)) for kind, ask in self.asks.items()),
            threading.Thread(target=self._run_patient),
        ]

    def __enter__(self) -> Stream:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self, kind: str, ask: Ask) -> None:
        with Client(self.url, FP32, timeout_s=_TIMEOUT_S, retry=RetryPolicy.off()) as client:
            while not self._stopped.is_set():
                sent_at = time.monotonic()
                outcome = self._outcome(ask, client)
                with self._lock:
                    self.events.append(Event(kind, sent_at, time.monotonic(), outcome))
                if outcome != "right":
                    self._stopped.wait(0.02)

    def _run_patient(self) -> None:
        with Client(self.url, FP32, timeout_s=_TIMEOUT_S, retry=_PATIENT) as client:
            while not self._stopped.is_set():
                self.retried[self._outcome(self.asks["text"], client)] += 1
                self._stopped.wait(0.1)

    def _outcome(self, ask: Ask, client: Client) -> str:
        try:
            is_right = ask(client) >= MIN_COSINE
        except TuwenError as error:
            return type(error).__name__
        if not is_right:
            self.wrong += 1
        return "right" if is_right else "WRONG"

    def await_quiet(self, since: float) -> float:
        """Seconds from `since` to the end of the last request that failed or took long, once none has for a while."""
        deadline = time.monotonic() + MAX_FAULT_S
        while time.monotonic() < deadline:
            time.sleep(0.1)
            with self._lock:
                recent = [each for each in self.events if each.ended_at >= since]
            bad = [
                each.ended_at for each in recent if each.outcome != "right" or each.ended_at - each.sent_at > QUIET_S
            ]
            last = max(bad, default=since)
            good = {each.kind for each in recent if each.outcome == "right" and each.sent_at > last}
            if good == self.asks.keys() and time.monotonic() - last > QUIET_S:
                return last - since
        raise SystemExit(f"not well again after {MAX_FAULT_S:g} s")

    def outcomes_since(self, since: float) -> dict[str, int]:
        with self._lock:
            return dict(Counter(each.outcome for each in self.events if each.ended_at >= since))


@contextmanager
def supervised(repository: Path) -> Iterator[Supervisor]:
    """A server as `tuwen serve` runs it, in this process."""
    grpc_port, http_port, metrics_port = free_ports(3)

    def make_server() -> EmbeddedServer:
        return EmbeddedServer(
            repository,
            models=[f"{FP32}_{part}" for part in ("text", "image", "similarity")],
            grpc_port=grpc_port,
            http_port=http_port,
            metrics_port=metrics_port,
            cache_size_bytes=0,
            admin_token="the-token-of-this-measurement",
        )

    supervisor = Supervisor(
        make_server, max_repairs=100, on_event=lambda sentence: print(f"    {sentence}", flush=True)
    )
    supervisor.start()
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield supervisor
    finally:
        supervisor.request_stop()
        thread.join()


def make_asks(url: str) -> dict[str, Ask]:
    """One request of each kind, with the right answers asked for while all is well."""
    texts = muge_like_texts(20, seed=3)
    jpegs = [encode_jpeg(picture, (320, 240)) for _, picture in photographs()][:3]
    with Client(url, FP32) as client:
        rows, image_rows = client.embed_text(texts), client.embed_images(jpegs)
    cosines = image_rows @ rows.T
    turn = iter(range(10**9))

    def ask_text(client: Client) -> float:
        index = next(turn) % len(texts)
        return float(client.embed_text([texts[index]])[0] @ rows[index])

    def ask_image(client: Client) -> float:
        index = next(turn) % len(jpegs)
        return float(client.embed_images([jpegs[index]])[0] @ image_rows[index])

    def ask_similarity(client: Client) -> float:
        scores = client.score(jpegs[:1], texts[:3])
        return 1.0 - float(np.abs(scores.cosine - cosines[:1, :3]).max())

    return {"text": ask_text, "image": ask_image, "similarity": ask_similarity}


def kill_model(supervisor: Supervisor, instance: str) -> None:
    os.kill(_model_processes(supervisor.server)[instance], signal.SIGKILL)


def pause_server(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    time.sleep(PAUSE_S)
    os.kill(server.pid, signal.SIGCONT)


def kill_server(server: EmbeddedServer) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)


def fill_shared_memory() -> None:
    """Not a byte left in /dev/shm for a while: neither the server's processes nor the client's may take more."""
    path = Path("/dev/shm/everything")
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 2**16)
    time.sleep(PAUSE_S)
    path.unlink()


def cut_connection(url: str, ask: Ask) -> dict[str, Any]:
    """A client behind a relay that is cut while its request is under way: what it sees, and how soon it goes on."""
    found: dict[str, Any] = {}
    for name, retry in (("no retries", RetryPolicy.off()), ("default retries", RetryPolicy())):
        with Relay(url) as relay, Client(relay.url, FP32, timeout_s=_TIMEOUT_S, retry=retry) as client:
            ask(client)
            timer = threading.Timer(0.005, relay.cut)
            started = time.monotonic()
            timer.start()
            try:
                outcome = "right" if ask(client) >= MIN_COSINE else "WRONG"
            except TuwenError as error:
                outcome = type(error).__name__
            seen_after = time.monotonic() - started
            while True:
                try:
                    ask(client)
                    break
                except TuwenError:
                    time.sleep(0.02)
            found[name] = {
                "outcome": outcome,
                "seen after s": round(seen_after, 3),
                "answered again after s": round(time.monotonic() - started, 3),
            }
    return found


class Relay:
    """Passes bytes between a client and the server, until its connections are cut."""

    def __init__(self, url: str) -> None:
        host, port = url.split(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
            except OSError:
                return
            self._open += [client, server]
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(2**16):
                target.sendall(data)
        except OSError:
            pass
        target.close()


def _model_processes(server: EmbeddedServer) -> dict[str, int]:
    """Model instance -> process id."""
    found = descendants(server.pid or 0).items()
    return {command[8]: pid for pid, command in found if len(command) > 8 and "_stub" in command[0]}


def measure(supervisor: Supervisor) -> dict[str, Any]:
    url = supervisor.server.endpoints.grpc
    asks = make_asks(url)
    instances = [name for name in sorted(_model_processes(supervisor.server)) if name.endswith("_0")]
    faults: dict[str, Callable[[], None]] = {
        **{f"SIGKILL {name}": partial(kill_model, supervisor, name) for name in instances},
        f"SIGSTOP for {PAUSE_S:g} s": lambda: pause_server(supervisor.server),
        "SIGKILL tritonserver": lambda: kill_server(supervisor.server),
        **({f"/dev/shm full for {PAUSE_S:g} s": fill_shared_memory} if os.environ.get(_INSIDE) else {}),
    }
    found: dict[str, Any] = {}
    with Stream(url, asks) as stream:
        stream.await_quiet(time.monotonic())
        for name, inflict in faults.items():
            stream.retried.clear()
            since = time.monotonic()
            inflict()
            recovered = stream.await_quiet(since)
            found[name] = {
                "well again after s": round(recovered, 2),
                "without retries": stream.outcomes_since(since),
                "with retries": dict(stream.retried),
            }
            print(f"{name}: {found[name]}", flush=True)
    found["connection cut"] = cut_connection(url, asks["text"])
    print(f"connection cut: {found['connection cut']}", flush=True)
    found["wrong answers"] = stream.wrong
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH_DIR / "faults.json")
    options = parser.parse_args()
    repository = bench_repository()
    _enter_small_shared_memory()
    with supervised(repository) as supervisor:
        found = measure(supervisor)
    write_json(options.out, {"machine": machine(), "at": time.strftime("%Y-%m-%d"), **found})
    print(f"wrong answers: {found['wrong answers']}\n{options.out}")
    if found["wrong answers"]:
        raise SystemExit("a wrong answer was given")


def _enter_small_shared_memory() -> None:
    """Start again with a /dev/shm of our own, small enough to be filled; needs root, and goes on without it."""
    if os.environ.get(_INSIDE):
        return
    mount = f"mount -t tmpfs -o size={_SHM_MIB}m tmpfs /dev/shm"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "sh", "-c", mount], capture_output=True).returncode:
        print("no mount namespace here (root and unshare needed): /dev/shm will not be filled")
        return
    os.environ[_INSIDE] = "1"
    sys.stdout.flush()
    arguments = " ".join(f'"{each}"' for each in (sys.executable, "-m", "perf.faults", *sys.argv[1:]))
    os.execv(unshare, [unshare, "-m", "sh", "-c", f"{mount} && exec {arguments}"])


if __name__ == "__main__":
    main()
