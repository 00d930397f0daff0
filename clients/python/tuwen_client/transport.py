"""One gRPC channel to one server, and what comes back over it as an answer or an error of ours.

Both twins use the futures of gRPC's own threads: `AsyncClient` has them wake its event loop. That costs a tenth more
processor time an item than `grpc.aio` (149 against 132 µs, measured), and there is one transport instead of two.
"""

from __future__ import annotations

import threading
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tuwen_client.errors import TuwenError, from_status
from tuwen_client.memory import Region, SharedPictures
from tuwen_client.options import ClientOptions
from tuwen_client.tracing import Headers

# What a server reads to open shared memory to a client; source: tuwen/serving/access.py.
TOKEN_HEADER = "triton-grpc-protocol-tuwen-admin-token"  # noqa: S105, a name
_GOODBYE_TIMEOUT_S = 1.0
# No request is ever cancelled on its way, not even by a deadline: Triton before 25.04 may crash of that, taking all
# other requests with it (its issues 7368 and 8034; `python -m perf.cancellations` measures it). A caller whose time is
# up goes on, the request ends by itself: the server's queues drop it then. These bound what a server that hangs keeps.
_ABANDONED_FOR_S = 60.0
_CLOSE_TIMEOUT_S = 3.0

_CHANNEL_ARGS = [
    # A server that comes back is found again within 0.3 s, instead of gRPC's default back-off of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 300),
    # In spite of its name also the time that one attempt to connect may take: a far or busy server needs it.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # A host that vanishes without a word is noticed after 20 s, measured; grpcio 1.85 heeds the ping's own timeout,
    # not keepalive's, which older ones know alone. Triton 2.51 allows these pings: a silent call of 45 s survived.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.primary_user_agent", "tuwen-client"),
    # Retries are ours: gRPC's would not know a full queue from a server that is gone.
    ("grpc.enable_retries", 0),
    # Channels of one address would share a connection otherwise, and with it the state of a TLS handshake.
    ("grpc.use_local_subchannel_pool", 1),
]


class Server:
    """The channel to one endpoint, and the memory shared with it."""

    def __init__(self, url: str, options: ClientOptions) -> None:
        self._options = options
        self._channel = _open_channel(url, options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self.pictures = SharedPictures(self._register, self._unregister) if options.shared_memory else None
        self._under_way = 0
        self._ended = threading.Condition()

    def infer(self, request: Any, timeout_s: float, headers: Headers) -> Any:
        """The future of a ModelInferResponse.

        It may come long after timeout_s, when nobody waits for it any more; the caller keeps the time.
        """
        future = self._stub.ModelInfer.future(
            request, timeout=timeout_s + _ABANDONED_FOR_S, metadata=self._options.headers + headers
        )
        with self._ended:
            self._under_way += 1
        future.add_done_callback(self._count_ended)
        return future

    def ask(self, method: str, request: Any) -> Any:
        """The future of another method's response."""
        return self._future(method, request, self._options.timeout_s, self._options.headers)

    def close(self) -> None:
        """Give back the memory, close the channel; what is under way may end first, if it does so soon."""
        with self._ended:
            self._ended.wait_for(lambda: self._under_way == 0, _CLOSE_TIMEOUT_S)
        if self.pictures is not None:
            self.pictures.close()
        self._channel.close()

    def _future(self, method: str, request: Any, timeout_s: float, headers: Headers) -> Any:
        return getattr(self._stub, method).future(request, timeout=timeout_s, metadata=headers)

    def _count_ended(self, _: Any) -> None:
        with self._ended:
            self._under_way -= 1
            self._ended.notify_all()

    def _register(self, region: Region) -> None:
        request = service_pb2.SystemSharedMemoryRegisterRequest(
            name=region.name, key=f"/{region.name}", offset=0, byte_size=region.size_bytes
        )
        self._tell("SystemSharedMemoryRegister", request, self._options.timeout_s)

    def _unregister(self, region: Region) -> None:
        request = service_pb2.SystemSharedMemoryUnregisterRequest(name=region.name)
        self._tell("SystemSharedMemoryUnregister", request, _GOODBYE_TIMEOUT_S)

    def _tell(self, method: str, request: Any, timeout_s: float) -> None:
        token = self._options.token
        headers = self._options.headers + (((TOKEN_HEADER, token),) if token else ())
        response_of(self._future(method, request, timeout_s, headers))


def response_of(future: Any) -> Any:
    """The response; waits for it.

    Raises:
        TuwenError: whatever went wrong.
    """
    code = future.code()
    if code is grpc.StatusCode.OK:
        return future.result()
    raise from_status(code.name, future.details())


def _open_channel(url: str, options: ClientOptions) -> grpc.Channel:
    compression = grpc.Compression.Gzip if options.compression else None
    if options.tls is None:
        return grpc.insecure_channel(url, _CHANNEL_ARGS, compression=compression)
    credentials = grpc.ssl_channel_credentials(*options.tls.read())
    return grpc.secure_channel(url, credentials, _CHANNEL_ARGS, compression=compression)


def closed_error(url: str) -> TuwenError:
    """For whoever asks a client that was closed."""
    return TuwenError(f"this client of {url} is closed; make a new one")
