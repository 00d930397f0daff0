"""One tritonserver and its model processes: tied to this process's life, watched, and cleared away.

command, environment, folder -> a process whose end is an event. Used by server.py.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tuwen.serving.model_processes import ModelProcessWatch

log = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.5
_SHARED_MEMORY_DIR = Path("/dev/shm")
# Becomes the server, after asking the kernel to end it (SIGTERM) when the thread that started it ends: kill -9 of
# `tuwen serve` leaves no server behind. Unlike a preexec_fn, no Python runs between fork and exec of this process.
_EXEC_TIED_TO_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerProcess:
    """Started by the constructor; over once it ended or one of its model processes died."""

    def __init__(
        self, command: list[str], *, environment: dict[str, str], run_dir: Path, log_path: Path | None, shm_prefix: str
    ) -> None:
        """Start it.

        Args:
            run_dir: its working folder, where its model processes look for modules first.
            log_path: what it says; None: on this process's standard error.
            shm_prefix: every segment of that name in /dev/shm is its own, and removed when it ends.
        Raises:
            OSError: the log cannot be written or the process cannot be started.
        """
        self.dead_model: str | None = None
        self.exited = threading.Event()
        self.over = threading.Event()
        self._is_stopping = False
        self._shm_prefix = shm_prefix
        self._process: subprocess.Popen[bytes] | None = None
        self._launch_error: OSError | None = None
        launched = threading.Event()
        # The kernel's parent-death signal follows the thread that forked: this thread lives as long as the server.
        self._keeper = threading.Thread(
            target=self._keep,
            args=(command, environment, run_dir, log_path, launched),
            name="tritonserver-keeper",
            daemon=True,
        )
        self._keeper.start()
        launched.wait()
        if self._launch_error is not None:
            raise self._launch_error

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative for the signal that killed it."""
        return self._process.returncode if self._process else None

    @property
    def has_died(self) -> bool:
        """Whether it, or a model process, ended in another way than by a stop() or a SIGTERM from elsewhere."""
        return self.over.is_set() and not self._is_stopping and self.returncode != 0

    def expect_exits(self) -> None:
        """From now on model processes end because they are asked to."""
        self._is_stopping = True

    def forget_dead(self) -> None:
        """The dead model has been replaced: watch on."""
        self.dead_model = None
        self.over.clear()

    def stop(self, timeout_s: float) -> None:
        """SIGTERM, which lets in-flight requests finish; SIGKILL to all its processes after the timeout."""
        self.expect_exits()
        if self._process is None:
            return
        self._process.terminate()
        # With a dead model process Triton would wait its whole exit timeout for nothing.
        if not self.exited.wait(0 if self.dead_model else timeout_s):
            log.debug("tritonserver %d is killed", self._process.pid)
            _kill_group(self._process.pid)
        self._keeper.join()

    def _keep(
        self,
        command: list[str],
        environment: dict[str, str],
        run_dir: Path,
        log_path: Path | None,
        launched: threading.Event,
    ) -> None:
        try:
            with log_path.open("wb") if log_path else contextlib.nullcontext(sys.stderr) as log_file:
                # A session of its own: Ctrl-C reaches `tuwen serve` alone, and the model processes form one group.
                process = self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _EXEC_TIED_TO_PARENT, str(os.getpid()), *command],
                    env=environment,
                    cwd=run_dir,
                    stdin=subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._launch_error = error
            return
        finally:
            launched.set()
        self._watch_until_exit(process)
        _kill_group(process.pid)
        for leftover in _SHARED_MEMORY_DIR.glob(f"{self._shm_prefix}*"):
            leftover.unlink(missing_ok=True)
        self.exited.set()
        self.over.set()

    def _watch_until_exit(self, process: subprocess.Popen[bytes]) -> None:
        watch = ModelProcessWatch(process.pid)
        while True:
            try:
                process.wait(_WATCH_INTERVAL_S)
                return
            except subprocess.TimeoutExpired:
                # A model process also ends when the server unloads it on its way out.
                if self.dead_model is None and not self._is_stopping and (dead := watch.find_dead()):
                    self.dead_model = dead
                    self.over.set()


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
