"""Triton's log -> one sentence about why it did not start, or its last line worth reading.

A line of 2.51: `E1124 01:49:01.394516 4455 model_lifecycle.cc:642] "failed to load 'tower' version 1: Internal: ..."`.
The message is a JSON string, its line breaks escaped; early lines of a model process and protobuf's own are plain text.
Every pattern below comes from a log of 2.51.
"""

import json
import re
from collections.abc import Iterator

_LINE = re.compile(r"^[IWEF]\d{4} [\d:.]+ +\d+ \S+:\d+\] *(?P<message>.*)$")
# Always written on a machine without a GPU; they stop nothing.
_HARMLESS = re.compile(
    r"CUDA driver version is insufficient|CUDA memory pool disabled|CudaDriverHelper|pinned system memory"
    r"|Failed to initialize NVML|DCGM"
)
_UNINFORMATIVE = re.compile(
    r"^[+|]|^$|^Timeout \d+:|^Waiting for in-flight|^All models are stopped|Non-graceful termination detected"
)

_MODEL_FAILURES = (
    re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)", re.DOTALL),
    re.compile(r"failed to load model '(?P<model>[^']+)': (?P<reason>.*)", re.DOTALL),
    re.compile(r"Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.*)", re.DOTALL),
    re.compile(r"failed to poll model '(?P<model>[^']+)': (?P<reason>.*)", re.DOTALL),
)
# Written last, and for an ensemble only: the way it depends on a part says less than the part's own line.
_ENSEMBLE_FAILURE = re.compile(r".*load failed for model '(?P<model>[^']+)': (?P<reason>.*)")
_PORT_TAKEN = re.compile(r"failed to start (?P<service>\w+) service: .*'(?P<address>\S+)' already in use")

_STATUS = re.compile(r"^(Internal|Invalid argument|Unavailable|Not found|Unsupported|Unknown): ")
_RAISED_ON_PURPOSE = re.compile(r"^(TritonModelException|TuwenError|InvalidInput|MissingDependency): ")
_FRAME = re.compile(r"^ +(?P<path>(?!.*site-packages)\S+\.py)\((?P<line>\d+)\): ", re.MULTILINE)
_CONFIG_UNREADABLE = re.compile(r"failed to read text proto from (?P<path>\S+)")
_PROTOBUF_ERROR = re.compile(r"\[libprotobuf ERROR .*text-format \S+: (?P<line>\d+):(?P<column>\d+): (?P<what>.*)")
_STUB_DIED = re.compile(r"Stub process '[^']+' is not healthy")
_LIBRARY_MISSING = re.compile(r".*error while loading shared libraries: (?P<what>.*)")


def log_messages(log_text: str) -> Iterator[str]:
    """The log's messages in order, without time and place and without the harmless ones."""
    for line in log_text.splitlines():
        found = _LINE.match(line)
        message = found["message"] if found else line
        if message.startswith('"'):
            try:
                message = json.loads(message, strict=False)
            except ValueError:
                message = message.strip('"')
        if not _HARMLESS.search(message):
            yield message


def explain_failed_start(log_text: str) -> str | None:
    """What kept the server from starting, beginning with the first model to fail; None when the log does not say."""
    messages = list(log_messages(log_text))
    failures: dict[str, str] = {}
    for message in messages:
        if found := _first_match(_MODEL_FAILURES, message):
            failures.setdefault(found["model"], _reason(found["reason"], messages))
    if failures:
        (model, reason), *others = failures.items()
        also = f"; nor does {', '.join(name for name, _ in others)}" if others else ""
        return f"model {model} does not load: {reason}{also}"
    for message in messages:
        if found := _ENSEMBLE_FAILURE.match(message):
            return f"model {found['model']} does not load: {_reason(found['reason'], messages)}"
        if found := _PORT_TAKEN.match(message):
            return f"{found['address']} is taken, so the {found['service']} service cannot listen there"
    return None


def last_meaningful_line(log_text: str) -> str | None:
    """The last message that says something, its first line alone."""
    telling = (message for message in reversed(list(log_messages(log_text))) if not _UNINFORMATIVE.search(message))
    return next((message.strip().partition("\n")[0] for message in telling), None)


def _first_match(patterns: tuple[re.Pattern[str], ...], text: str) -> re.Match[str] | None:
    return next((found for pattern in patterns if (found := pattern.match(text))), None)


def _reason(text: str, messages: list[str]) -> str:
    if found := _CONFIG_UNREADABLE.search(text):
        complaint = _first_match_in(_PROTOBUF_ERROR, messages)
        where = f", line {complaint['line']}, column {complaint['column']}: {complaint['what']}" if complaint else ""
        return f"cannot read {found['path']}{where}"
    if _STUB_DIED.search(text):
        library = _first_match_in(_LIBRARY_MISSING, messages)
        return "its Python process died while loading" + (f" ({library['what']})" if library else "")
    head, _, trace = _STATUS.sub("", text).partition("\n\nAt:\n")
    reason = " ".join(head.split())
    if _RAISED_ON_PURPOSE.match(reason):
        return _RAISED_ON_PURPOSE.sub("", reason)
    frame = _FRAME.search(trace)
    return f"{reason} ({frame['path']}, line {frame['line']})" if frame else reason


def _first_match_in(pattern: re.Pattern[str], messages: list[str]) -> re.Match[str] | None:
    return next((found for message in messages if (found := pattern.match(message))), None)
