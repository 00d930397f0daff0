"""Start, await and stop the real Triton: the one inside the wheel nvidia-pytriton, or that of NVIDIA's image.

    with EmbeddedServer(Path("model_repository")) as server:   # every built ensemble, ready
        print(server.endpoints.grpc)
        server.wait()

`tuwen serve` runs it. Loopback only, unless a host is given.
"""

import errno
import logging
import os
import shutil
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tuwen.errors import TuwenError
from tuwen.serving.access import Tls, check_token, new_token, token_arguments
from tuwen.serving.control import ControlFailed, ServerControl
from tuwen.serving.installation import Installation, assemble_run_dir, find_installation, server_environment
from tuwen.serving.model_processes import model_of
from tuwen.serving.model_repository import (
    built_models,
    called_models,
    keeps_requests,
    missing_files,
    model_names,
)
from tuwen.serving.server_log import explain_failed_start, last_meaningful_line
from tuwen.serving.server_process import ServerProcess

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30
EXIT_TIMEOUT_S = 5.0
REVIVE_TIMEOUT_S = 60
# 64 MiB holds some 30,000 text embeddings of 512 numbers: Triton's entry is the row and about 150 bytes more.
DEFAULT_CACHE_SIZE_BYTES = 64 << 20
_POLL_INTERVAL_S = 0.05
_LOOPBACK = "127.0.0.1"
_EVERYWHERE = "0.0.0.0"
# As a log's path: this process's own standard error, which is where a container's log is looked for.
STDERR = Path("-")
_FIXED_ARGUMENTS = (
    # Our configurations are complete. Completing them starts every model process twice: 1.9 s against 0.3 s.
    "--disable-auto-complete-config",
    "--exit-on-error=true",
    "--strict-readiness=true",
    f"--exit-timeout-secs={STOP_TIMEOUT_S}",
    "--metrics-config=summary_latencies=true",
    "--metrics-config=summary_quantiles=0.5:0.05,0.95:0.005,0.99:0.001",  # each with its allowed error
)
_BUILD_HINT = "run `tuwen build --checkpoint ...` first"


class ServerError(TuwenError):
    """The embedded server did not start, or ended without being asked; the message says why and where its log is."""


@dataclass(frozen=True)
class Endpoints:
    """Addresses for clients on this machine: grpc is host:port, http and metrics are URLs."""

    grpc: str
    http: str
    metrics: str

    @property
    def http_address(self) -> str:
        """host:port"""
        return self.http.removeprefix("http://")


class EmbeddedServer:
    """One run of the server, from start() to stop(); as a context manager it does both."""

    def __init__(
        self,
        repository: Path,
        *,
        models: Sequence[str] | None = None,
        host: str = "127.0.0.1",
        grpc_port: int = 8001,
        http_port: int = 8000,
        metrics_port: int = 8002,
        log_path: Path | None = None,
        startup_timeout_s: float = 120.0,
        model_config_name: str | None = None,
        cache_size_bytes: int = DEFAULT_CACHE_SIZE_BYTES,
        tls: Tls | None = None,
        admin_token: str | None = None,
        metrics_everywhere: bool = False,
    ) -> None:
        """Nothing is touched before start().

        Args:
            models: the models to load, with the parts of ensembles; none given: every ensemble that is built.
            log_path: Triton's log; None keeps it in a temporary folder, which an orderly stop removes; STDERR shows it.
            model_config_name: the profile: configs/NAME.pbtxt where a model has one, config.pbtxt elsewhere.
            cache_size_bytes: of the cache of answers, for models whose config says response_cache; 0 turns it off.
            tls: of the gRPC endpoint; Triton's HTTP has none, so HTTP and metrics then stay on loopback.
            admin_token: opens loading, tracing, logging and shared memory; None: one that is made up.
            metrics_everywhere: they listen on all addresses, where `host` or TLS would keep them on one.
        """
        self._repository = repository.absolute()
        self._models = models
        self.models: list[str] = []  # those that are served, once started
        self._host = host
        self._ports = {"--grpc-port": grpc_port, "--http-port": http_port, "--metrics-port": metrics_port}
        self._startup_timeout_s = startup_timeout_s
        self._model_config_name = model_config_name
        self._cache_size_bytes = cache_size_bytes
        self._tls = tls
        self.admin_token = check_token(admin_token, "admin_token") if admin_token is not None else new_token()
        # A wildcard address is for listening; a client on this machine uses loopback.
        self._client_host = _LOOPBACK if host == _EVERYWHERE else host
        self._plain_host = _LOOPBACK if tls else host
        self._plain_client_host = _LOOPBACK if tls else self._client_host
        self._hosts = {
            "--grpc-port": host,
            "--http-port": self._plain_host,
            "--metrics-port": _EVERYWHERE if metrics_everywhere else self._plain_host,
        }
        self._logs_to_stderr = log_path == STDERR
        self._log_path = log_path.absolute() if log_path and not self._logs_to_stderr else None
        self._state_dir: Path | None = None
        self._process: ServerProcess | None = None
        self._keep_log = log_path is not None

    @property
    def endpoints(self) -> Endpoints:
        """Where clients on this machine reach the server."""
        grpc, http, metrics = self._ports.values()
        plain = f"http://{self._plain_client_host}"
        return Endpoints(f"{self._client_host}:{grpc}", f"{plain}:{http}", f"{plain}:{metrics}/metrics")

    @property
    def pid(self) -> int | None:
        """The server's process id; None before start()."""
        return self._process.pid if self._process else None

    @property
    def is_alive(self) -> bool:
        """Whether the server runs and none of its model processes has died."""
        return self._process is not None and not self._process.over.is_set()

    @property
    def dead_model(self) -> str | None:
        """The model instance whose process has died, such as `vit_b_16_text_tower_0_0`; see revive()."""
        return self._process.dead_model if self._process else None

    @property
    def control(self) -> ServerControl:
        """For the operator: models loaded and unloaded, statistics."""
        return ServerControl(self._plain_client_host, self._ports["--http-port"], self.admin_token)

    @property
    def log_path(self) -> Path | None:
        """Triton's own log; None before start() unless one was asked for, and where it goes to standard error."""
        return self._log_path

    def __enter__(self) -> "EmbeddedServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Endpoints:
        """Start the server and return once every requested model, and every part of it, is ready.

        Raises:
            ServerError: nothing to serve, a port is taken, a model does not load, or it takes too long.
            InvalidInput: a config.pbtxt cannot be read.
            MissingDependency: the wheel, or what it needs, is not installed.
        """
        if self._process is not None:
            raise ServerError("this server has been started already: make a new EmbeddedServer")
        installation = find_installation()
        self.models = self._choose_models()
        if self._tls:
            self._tls.check()
        self._check_ports()
        started_at = time.monotonic()
        try:
            self._process = self._launch(installation, self.models)
            self._await_ready(self._process, self.models, started_at + self._startup_timeout_s)
        except BaseException:
            self.stop(timeout_s=0)
            raise
        log.info(
            "%s ready after %.1f s at %s", ", ".join(self.models), time.monotonic() - started_at, self.endpoints.grpc
        )
        return self.endpoints

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the server ends; whether it did, as it was asked to, within the time given.

        Raises:
            ServerError: the server or one of its model processes died; stop() clears up what is left.
        """
        if self._process is None:
            raise ServerError("this server has not been started")
        if not self._process.over.wait(timeout_s):
            return False
        if not self._process.has_died:
            return True
        if self._process.dead_model:
            raise self._error(f"the process of model instance {self._process.dead_model} died")
        raise self._error(_describe_exit(self._process.returncode) + self._last_line())

    def revive(self, timeout_s: float = REVIVE_TIMEOUT_S) -> str:
        """Give the model whose process died a new one; all others go on answering meanwhile. Returns its name.

        Raises:
            ServerError: requests died with that process, which Triton would never answer; or the server does not do it
                in time. It must be started anew.
        """
        instance = self.dead_model
        model = model_of(instance) if instance else None
        if self._process is None or model is None:
            raise ServerError(f"no model to give a new process ({instance or 'none has died'})")
        if keeps_requests(self._repository, model):
            raise self._error(f"the process of model instance {instance} died with the requests that waited in it")
        deadline = time.monotonic() + timeout_s
        try:
            self.control.unload([model], timeout_s=0)
            self.control.load(model, max(1.0, deadline - time.monotonic()))
        except ControlFailed as error:
            raise self._error(f"model {model} cannot be loaded again: {error}") from error
        self._process.forget_dead()
        return model

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End the server and its model processes, in-flight requests first; safe before start() and a second time.

        Args:
            timeout_s: after this the processes are killed.
        """
        if self._process is not None:
            self._keep_log = self._keep_log or self._process.has_died
            left_s = self._drain(self._process, timeout_s) if timeout_s and self.is_alive else timeout_s
            self._process.stop(left_s)
        if self._state_dir is not None:
            shutil.rmtree(self._state_dir / "run" if self._keep_log else self._state_dir, ignore_errors=True)

    def _drain(self, process: ServerProcess, timeout_s: float) -> float:
        """Refuse what is new and answer what is under way; returns how long the processes may still take to end.

        Models that call others finish first, while those still answer: Triton alone would stop all of them at once.
        """
        process.expect_exits()
        deadline = time.monotonic() + timeout_s
        calling = [name for name in self.models if called_models(self._repository, name)]
        others = [name for name in self.models if name not in calling]
        try:
            for models in (calling, others):
                self.control.unload(models, max(0.1, deadline - time.monotonic()))
        except ControlFailed as error:
            log.warning("stopping before all is answered: %s", error)
            return max(0.0, deadline - time.monotonic())
        # Nothing is under way any more. Triton might still wait for a client's idle connection, or for a model
        # that was replaced because its process died.
        return min(EXIT_TIMEOUT_S, max(0.0, deadline - time.monotonic()))

    def _choose_models(self) -> list[str]:
        present = model_names(self._repository)
        if not present:
            what = "no model in this repository" if self._repository.is_dir() else "no such model repository"
            raise ServerError(f"{self._repository}: {what}; {_BUILD_HINT}")
        if not self._models:
            models = built_models(self._repository, model_config_name=self._model_config_name)
            if not models:
                raise ServerError(f"{self._repository}: no ensemble is built yet; {_BUILD_HINT}")
            return models
        for name in self._models:
            if name not in present:
                raise ServerError(f"{self._repository}: no model {name}; there are {', '.join(present)}")
            missing = missing_files(self._repository, name, model_config_name=self._model_config_name)
            if missing:
                raise ServerError(f"model {name} is not built, {missing[0]} is missing; {_BUILD_HINT}")
        called = (part for name in self._models for part in called_models(self._repository, name))
        return list(dict.fromkeys([*self._models, *called]))

    def _check_ports(self) -> None:
        flags: dict[int, str] = {}
        for flag, port in self._ports.items():
            if not 1 <= port <= 65535:
                raise ServerError(f"{flag} {port}: a port is a number from 1 to 65535")
            if port in flags:
                raise ServerError(f"{flags[port]} and {flag} are both {port}: choose another for one of them")
            flags[port] = flag
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                host = self._hosts[flag]
                try:
                    probe.bind((host, port))
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        raise ServerError(f"port {port} is taken: choose another with {flag}") from error
                    raise ServerError(f"cannot listen on {host}:{port} ({flag}): {error.strerror}") from error

    def _launch(self, installation: Installation, models: list[str]) -> ServerProcess:
        self._state_dir = Path(tempfile.mkdtemp(prefix="tuwen-serve-"))
        run_dir = self._state_dir / "run"
        run_dir.mkdir()
        backends_dir = assemble_run_dir(installation, run_dir)
        if not self._logs_to_stderr:
            self._log_path = self._log_path or self._state_dir / "tritonserver.log"
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
        shm_prefix = f"tuwen_{os.getpid()}_{uuid.uuid4().hex[:8]}_"
        try:
            return ServerProcess(
                [str(installation.binary), *self._arguments(installation, models, backends_dir, shm_prefix)],
                environment=server_environment(installation),
                run_dir=run_dir,
                log_path=self._log_path,
                shm_prefix=shm_prefix,
            )
        except OSError as error:
            raise ServerError(f"cannot start the server: {error}") from error

    def _arguments(
        self, installation: Installation, models: list[str], backends_dir: Path, shm_prefix: str
    ) -> list[str]:
        return [
            f"--model-repository={self._repository}",
            f"--backend-directory={backends_dir}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in models),
            *([f"--model-config-name={self._model_config_name}"] if self._model_config_name else []),
            *(f"{flag.replace('port', 'address')}={host}" for flag, host in self._hosts.items()),
            *(f"{flag}={port}" for flag, port in self._ports.items()),
            *(self._tls.arguments() if self._tls else []),
            *token_arguments(self.admin_token),
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
            f"--cache-directory={installation.caches_dir}",
            *([f"--cache-config=local,size={self._cache_size_bytes}"] if self._cache_size_bytes else []),
            *_FIXED_ARGUMENTS,
        ]

    def _await_ready(self, process: ServerProcess, models: list[str], deadline: float) -> None:
        paths = ["/v2/health/ready", *(f"/v2/models/{name}/ready" for name in models)]
        pending = [("--http-port", path) for path in paths] + [("--metrics-port", "/metrics")]
        while pending:
            if process.exited.is_set():
                reason = explain_failed_start(self._read_log())
                raise self._error(reason or _describe_exit(process.returncode) + self._last_line())
            if time.monotonic() > deadline:
                raise self._error(f"tritonserver is not ready after {self._startup_timeout_s:g} s" + self._last_line())
            flag, path = pending[0]
            if self.control.answers(self._ports[flag], path):
                pending.pop(0)
            else:
                process.exited.wait(_POLL_INTERVAL_S)

    def _error(self, sentence: str) -> ServerError:
        self._keep_log = True
        return ServerError(f"{sentence} (Triton's log: {self._log_path or 'on standard error'})")

    def _last_line(self) -> str:
        line = last_meaningful_line(self._read_log())
        return f"; its last words: {line}" if line else ""

    def _read_log(self) -> str:
        try:
            return self._log_path.read_text(encoding="utf-8", errors="replace") if self._log_path else ""
        except OSError:
            return ""


def _describe_exit(returncode: int | None) -> str:
    if returncode is None or returncode >= 0:
        return f"tritonserver ended with exit code {returncode}"
    name = signal.Signals(-returncode).name
    return f"tritonserver was killed by {name}" + (", often for lack of memory" if name == "SIGKILL" else "")
