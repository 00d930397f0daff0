"""What `Client` and `AsyncClient` have in common: all but the waiting.

A twin loops over `Flight.next_attempt`, `Flight.send` and `Flight.take`, and waits for what `send` promised to deliver.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from tritonclient.grpc import service_pb2

from tuwen_client.calls import Attempt, Call, RegionLost, Window
from tuwen_client.codec import infer_request, read_outputs
from tuwen_client.endpoints import Endpoint, Endpoints
from tuwen_client.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelChanged,
    ModelNotFound,
    Overloaded,
    ServerUnavailable,
    TuwenError,
)
from tuwen_client.memory import Lease
from tuwen_client.options import (
    ClientOptions,
    Compression,
    Priority,
    RetryPolicy,
    Tls,
    check_timeout,
    default_token,
    header_pairs,
    priority_level,
    split_urls,
)
from tuwen_client.sides import IMAGE, TEXT, Embedded, Job, Row
from tuwen_client.tracing import Headers
from tuwen_client.transport import Server, closed_error, response_of

Answer = TypeVar("Answer")
ProgressHook = Callable[[int], None]
InvalidHook = Callable[[InvalidInput], None]
TruncatedHook = Callable[[int], None]

# Two full batches of the server's 32: one computes while the next one queues. `python -m perf.client_window` measures.
DEFAULT_MAX_IN_FLIGHT = 64

# Where a server caches a whole ensemble, Triton keeps of an answer what its first asker wanted, and gives the next one
# no more. Ours caches within it; with another server it is well to ask for everything.
_ALL_OUTPUTS = ()

now = time.monotonic


class Core:
    """A client's options, its servers, and the identity of the model it began with. Threads may share it."""

    def __init__(
        self,
        url: str | Sequence[str] = "localhost:8001",
        model: str | None = None,
        timeout_s: float = 30.0,
        max_in_flight: int = DEFAULT_MAX_IN_FLIGHT,
        *,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008, it is frozen
        priority: Priority = "bulk",
        tls: Tls | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        compression: Compression | None = None,
        shared_memory: bool = False,
    ) -> None:
        """Nothing is sent before it is needed.

        Args:
            url: host:port of a server's gRPC endpoint, or several: "a:8001,b:8001" or a list. Items go round those that
                answer; one that does not is left alone for a while and tried again.
            model: name the model is served under, as `tiny_rn`; by default the only one there is.
            timeout_s: deadline of each item, from when it is sent; waiting in the server and retries included.
            max_in_flight: most items under way at a time, in each call.
            retry: what is done when a server is gone or full; see `RetryPolicy`.
            priority: "interactive" items leave the server's queues before "bulk" ones.
            tls: encrypt, with these files; see `Tls`.
            token: the server's admin token, which shared memory needs; default: TUWEN_ADMIN_TOKEN.
            headers: sent with every request, for a proxy: {"authorization": "Bearer ..."}.
            compression: "gzip" for requests that cross a slow network.
            shared_memory: pictures reach a server on this host through /dev/shm. Where that does not work they go in
                their messages, after one warning.
        Raises:
            InvalidInput: an option cannot work, or a file of tls cannot be read.
        """
        urls = split_urls(url)
        self.url, self.timeout_s, self.max_in_flight = ",".join(urls), timeout_s, max_in_flight
        self._options = ClientOptions(
            urls, model, timeout_s, max_in_flight, retry, priority, tls,
            default_token(token), header_pairs(headers), compression, shared_memory,
        )  # fmt: skip
        self._model = model
        self._embed_dim: int | None = None
        self._fingerprint: int | None = None
        self._identifying = threading.Lock()
        self._is_closed = False
        self._endpoints = Endpoints(urls)
        self._servers = [Server(one, self._options) for one in urls]
        # Also when a program ends without close(): a server would keep what it shares with it.
        self._closer = weakref.finalize(self, _close, self._servers)

    def _close(self) -> None:
        self._is_closed = True
        self._closer()

    def _check_open(self) -> None:
        if self._is_closed:
            raise closed_error(self.url)

    # --- embedding ------------------------------------------------------------------------------------------

    def _flight(
        self,
        job: Job[Answer],
        model: str,
        deliver: Callable[[Sent], None],
        headers: Headers,
        asked: Asked,
    ) -> Flight[Answer]:
        window = Window(asked.max_in_flight, asked.timeout_s, self._options.retry, self._endpoints)
        return Flight(self, job, f"{model}_{job.model_suffix}", window, deliver, headers, asked)

    def _asked(
        self, timeout_s: float | None = None, priority: Priority | None = None, max_in_flight: int | None = None
    ) -> Asked:
        """One call's options, each the client's own unless it is given."""
        return Asked(
            self.timeout_s if timeout_s is None else check_timeout(timeout_s),
            priority_level(priority or self._options.priority),
            max_in_flight or self.max_in_flight,
        )

    def _identify(self, fingerprint: int) -> None:
        with self._identifying:
            if self._fingerprint is None:
                self._fingerprint = fingerprint
        if fingerprint != self._fingerprint:
            raise ModelChanged(
                f"the server embeds with model {fingerprint}, this client began with {self._fingerprint}; "
                "embed again with a new client"
            )

    # --- what is served -------------------------------------------------------------------------------------

    def _in_turn(self) -> list[Endpoint]:
        """Every endpoint, the one to ask first in front."""
        self._check_open()
        first = self._endpoints.choose(now())
        return [first, *(one for one in self._endpoints.all if one is not first)]

    def _health_questions(self, model: str) -> list[tuple[str, Any]]:
        sides = [service_pb2.ModelReadyRequest(name=f"{model}_{job.model_suffix}") for job in (TEXT, IMAGE)]
        return [("ServerReady", service_pb2.ServerReadyRequest()), *(("ModelReady", side) for side in sides)]

    def _note(self, endpoint: Endpoint, error: TuwenError | None) -> None:
        """What a question's end says of an endpoint's health; raises what another endpoint would say as well."""
        if isinstance(error, (ServerUnavailable, DeadlineExceeded)):
            self._endpoints.failed(endpoint, now())
            return
        self._endpoints.answered(endpoint)
        if error is not None and not isinstance(error, ModelNotFound):
            raise error

    def _only_model(self, served: Sequence[str]) -> str:
        if len(served) != 1:
            raise ModelNotFound(f"the server at {self.url} serves {listed(served)}; name one with model=...")
        self._model = served[0]
        return self._model

    def _with_served(self, error: ModelNotFound, served: Sequence[str]) -> ModelNotFound:
        error.message = f"{error.message}; the server at {self.url} serves {listed(served)}"
        return error


@dataclass(frozen=True)
class Asked:
    """Options of one call."""

    timeout_s: float
    priority_level: int
    max_in_flight: int


@dataclass(eq=False)
class Sent:
    """A request under way, and when it ended."""

    attempt: Attempt
    lease: Lease | None
    future: Any = None
    ended_at: float = 0.0


class Flight(Generic[Answer]):
    """One call of a client over many items.

    Args:
        deliver: called with each request that ended, from a thread of gRPC.
    """

    def __init__(
        self,
        core: Core,
        job: Job[Answer],
        model: str,
        window: Window,
        deliver: Callable[[Sent], None],
        headers: Headers,
        asked: Asked,
    ) -> None:
        self._core, self._job, self._model = core, job, model
        self.window = window
        self._deliver, self._headers, self._asked = deliver, headers, asked

    def packed(self, item: object) -> Any:
        """The item's tensors, or the error for an item that has none."""
        try:
            return self._job.pack(item)
        except InvalidInput as error:
            return error

    def must_prepare(self, attempt: Attempt) -> bool:
        """Whether `prepare` has to speak with the server, and wait, before this is sent."""
        pictures = self._core._servers[attempt.endpoint.number].pictures
        return self._job.may_share and pictures is not None and not pictures.is_prepared

    def prepare(self, attempt: Attempt) -> bool:
        """Share memory with the server; False settled the call, which must not be sent."""
        pictures = self._core._servers[attempt.endpoint.number].pictures
        assert pictures is not None
        try:
            pictures.prepare()
        except TuwenError as error:
            self.window.settle(attempt, error, now())
            return False
        return True

    def send(self, attempt: Attempt) -> None:
        """Start the request."""
        if self._core._is_closed:
            self.window.settle(attempt, closed_error(self._core.url), now())
            return
        server = self._core._servers[attempt.endpoint.number]
        tensors = attempt.call.tensors
        lease = server.pictures.put(tensors[0].data) if server.pictures and self._job.may_share else None
        sent = Sent(attempt, lease)
        request = infer_request(
            self._model,
            tensors,
            _ALL_OUTPUTS,
            self._asked.priority_level,
            attempt.timeout_s,
            lease.span if lease else None,
        )
        try:
            sent.future = server.infer(request, attempt.timeout_s, self._headers)
        except ValueError:  # gRPC's, for a closed channel, and for headers that cannot be sent
            if lease:
                lease.end(was_read=True)
            if not self._core._is_closed:
                raise
            self.window.settle(attempt, closed_error(self._core.url), now())
            return
        sent.future.add_done_callback(lambda future: self._ended(sent))

    def take(self, sent: Sent) -> None:
        """A request was delivered: read what came of it."""
        if sent.attempt.is_settled:  # too late
            return
        try:
            outcome: object = self._read(response_of(sent.future))
        except TuwenError as error:
            outcome = self._explained(error, sent)
        self.window.settle(sent.attempt, outcome, sent.ended_at)

    def failure(self, call: Call) -> TuwenError:
        """The error of a call, with its item and the rows that overtook it."""
        assert call.error is not None
        error = TuwenError(call.error.message) if isinstance(call.error, RegionLost) else call.error
        if isinstance(error, DeadlineExceeded):
            error.message = f"{error.message}; timeout_s is {self._asked.timeout_s:g}"
        error.index, error.item = call.index, self._job.describe(call.item)
        error.partial = {other.index: other.answer.row for other in self.window if isinstance(other.answer, Embedded)}
        return error

    def _ended(self, sent: Sent) -> None:
        sent.ended_at = now()
        if sent.lease:
            sent.lease.end(was_read=_has_answered(sent.future))
        self._deliver(sent)

    def _read(self, response: Any) -> Answer:
        try:
            outputs = read_outputs(response)
            fingerprint = int(outputs["fingerprint"].ravel()[0])
            answer = self._job.read(outputs)
        except (KeyError, ValueError, IndexError) as error:
            raise TuwenError(f"the server's answer cannot be read: {error}") from error
        self._core._identify(fingerprint)
        return answer

    def _explained(self, error: TuwenError, sent: Sent) -> TuwenError:
        if sent.lease and "shared memory region" in error.message:
            pictures = self._core._servers[sent.attempt.endpoint.number].pictures
            if pictures is not None:
                pictures.lost(sent.lease.region)
            return RegionLost(error.message)
        return error


def _has_answered(future: Any) -> bool:
    """Whether the server said that it is done with a request; if not, perhaps the connection alone is lost."""
    try:
        response_of(future)
    except (InvalidInput, Overloaded, ModelNotFound):
        return True
    except TuwenError:
        return False
    return True


def names_of_pairs(statistics: Any) -> list[str]:
    """Names of models whose two sides are in a ModelStatisticsResponse."""
    ready = {entry.name for entry in statistics.model_stats}
    names = (name.removesuffix("_text") for name in ready if name.endswith("_text"))
    return sorted(name for name in names if f"{name}_image" in ready)


def embed_dim_of(metadata: Any) -> int:
    """D, from the text ensemble's ModelMetadataResponse."""
    return int({output.name: output.shape for output in metadata.outputs}["text_embeds"][-1])


def listed(served: Iterable[str]) -> str:
    """Names in a sentence."""
    return ", ".join(served) or "no model"


def missing_row(embed_dim: int) -> Row:
    """In place of an item that was refused."""
    return np.full(embed_dim, np.nan, np.float32)


def tell_truncated(call: Call, hook: TruncatedHook) -> None:
    """Tell a hook of a text that was cut.

    Raises:
        TuwenError: the answer does not say.
    """
    if call.answer.is_truncated is None:
        error = TuwenError("the server's cache holds an answer without `truncated`: another client asked for less")
        error.index = call.index
        raise error
    if call.answer.is_truncated:
        hook(call.index)


def add_finished(error: TuwenError, finished: Sequence[Row]) -> None:
    """Rows that were handed out before an error count as done as well."""
    before = {index: row for index, row in enumerate(finished) if not np.isnan(row[0])}
    error.partial = before | dict(error.partial)


def _close(servers: Sequence[Server]) -> None:
    for server in servers:
        server.close()
