"""The processes in which a Triton runs its Python models: watched through /proc, because Triton itself does not look.

Measured with 2.51: when a model process dies, every request to the model fails ("Stub process 'NAME' is not healthy"),
yet model and server go on reporting ready, the log says nothing, nothing is restarted, and an orderly stop takes 30 s.
"""

from pathlib import Path

_PROC = Path("/proc")
_STUB_NAME = b"/triton_python_backend_stub"
# A stub's arguments: program, model file, shared-memory name, its size and growth, parent, backend folder, handle, instance.
_INSTANCE_ARGUMENT = 8


class ModelProcessWatch:
    """Remembers the model processes of one server and tells when one has died."""

    def __init__(self, server_pid: int) -> None:
        self._server_pid = server_pid
        self._instances: dict[int, str] = {}
        self._suspects: set[int] = set()

    def find_dead(self) -> str | None:
        """Call every second or two; the instance, such as `vit_b_16_text_tower_0_0`, whose process has died."""
        states = _child_states(self._server_pid)
        self._instances = {pid: self._instances.get(pid) or _instance_name(pid) for pid in states}
        # One that ends as asked, at an unload, is a zombie for a moment; a dead one until the server ends.
        zombies = {pid for pid, state in states.items() if state == "Z" and self._instances[pid]}
        dead = zombies & self._suspects
        self._suspects = zombies
        return self._instances[min(dead)] if dead else None


def _child_states(parent_pid: int) -> dict[int, str]:
    """Process id -> state letter of every child of the process."""
    states: dict[int, str] = {}
    for entry in _PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        # The name, in brackets, may itself hold brackets and spaces.
        state, parent, *_ = stat.rpartition(")")[2].split()
        if int(parent) == parent_pid:
            states[int(entry.name)] = state
    return states


def _instance_name(pid: int) -> str:
    """'' for a zombie, whose arguments are gone, and for a child that is not a model process."""
    try:
        arguments = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    if not arguments[0].endswith(_STUB_NAME) or len(arguments) <= _INSTANCE_ARGUMENT:
        return ""
    return arguments[_INSTANCE_ARGUMENT].decode()
