"""Trace context of OpenTelemetry: one span for each call of the client, whose context travels with every request.

Without that library installed nothing of this happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tuwen_client.errors import TuwenError

try:
    from opentelemetry import propagate, trace
except ImportError:  # an extra: tuwen-client[otel]
    trace = None  # type: ignore[assignment]

Headers = tuple[tuple[str, str], ...]


@contextmanager
def client_span(operation: str, model: str, address: str) -> Iterator[Headers]:
    """A span from here to the end of the block; yields the headers that make the server's spans its children.

    It does not become the current one: a generator that opened it may be resumed from any other context.
    """
    if trace is None:
        yield ()
        return
    attributes = {"rpc.system": "grpc", "server.address": address, "tuwen.model": model}
    span = trace.get_tracer("tuwen_client").start_span(
        f"tuwen_client.{operation}", kind=trace.SpanKind.CLIENT, attributes=attributes
    )
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(span))
    try:
        yield tuple(carrier.items())
    except TuwenError as error:
        # The sentence without its item: a trace is no place for what a user wrote.
        span.set_status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error.message}")
        raise
    finally:
        span.end()
