"""The processes in which a Triton runs its Python models: watched through /proc, because Triton itself does not look.

Measured with 2.51: when a model process dies, every request to the model fails ("Stub process 'NAME' is not healthy"),
yet model and server go on reporting ready, the log says nothing, nothing is restarted, and an orderly stop takes 30 s.
Loading the model again changes nothing, but unloading it first does: then it has a new process.
"""

import re
from pathlib import Path

_PROC = Path("/proc")
_STUB_NAME = b"/triton_python_backend_stub"
_STUB_COMM = "triton_python_b"  # the kernel keeps 15 characters, and keeps them for a zombie too
# A stub's arguments: program, model file, shared memory's name, size and growth, parent, folder, handle, instance.
_INSTANCE_ARGUMENT = 8


_INSTANCE = re.compile(r"(?P<model>.+)_\d+_\d+")


def model_of(instance: str) -> str | None:
    """`vit_b_16_text_tower` of `vit_b_16_text_tower_0_1`; None where the name is not known."""
    found = _INSTANCE.fullmatch(instance)
    return found["model"] if found else None


class ModelProcessWatch:
    """Remembers the model processes of one server and tells when one has died."""

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._instances: dict[int, str] = {}
        self._suspects: set[int] = set()
        self._told: set[int] = set()

    def find_dead(self) -> str | None:
        """Call again and again; the instance, such as `vit_b_16_text_tower_0_0`, whose process has died: each once."""
        states = _stub_states(self._server_pid)
        self._instances = {pid: self._instances.get(pid) or _instance_name(pid) for pid in states}
        # One that ends as asked, at an unload, is a zombie for a moment; a dead one until the server ends.
        zombies = {pid for pid, state in states.items() if state == "Z"}
        dead = (zombies & self._suspects) - self._told
        self._suspects = zombies
        if not dead:
            return None
        self._told.add(min(dead))
        return self._instances[min(dead)] or "(unknown)"


def _stub_states(parent_pid: int) -> dict[int, str]:
    """Process id -> state letter of every model process that the server started."""
    states: dict[int, str] = {}
    for entry in _PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        head, _, tail = stat.rpartition(")")
        state, parent, *_ = tail.split()
        if int(parent) == parent_pid and head.endswith(f"({_STUB_COMM}"):
            states[int(entry.name)] = state
    return states


def _instance_name(pid: int) -> str:
    """'' when the process has already lost its arguments."""
    try:
        arguments = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    if not arguments[0].endswith(_STUB_NAME) or len(arguments) <= _INSTANCE_ARGUMENT:
        return ""
    return arguments[_INSTANCE_ARGUMENT].decode()
