"""What every request passes: which hosts it may be meant for, and the headers of its answer."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def allowed_hosts(bound_to: str, more: Collection[str]) -> frozenset[str] | None:
    """Names a request may be addressed to; None allows all.

    Behind loopback a page of another site could reach this one under a name of its own that it points to 127.0.0.1 (DNS
    rebinding), so that names are checked there. Bound to a network, the names are known only if they are given.
    """
    if is_loopback(bound_to):
        return LOOPBACK_NAMES | {bound_to.lower()} | {name.lower() for name in more}
    return LOOPBACK_NAMES | {name.lower() for name in more} if more else None


def is_loopback(host: str) -> bool:
    """Whether this machine alone reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        app = self._app
        headers = Headers(scope=scope)
        if not self._is_meant_for_us(headers, scope["path"]):
            app = PlainTextResponse("this host name is not served here; see --allow-host", status_code=421)
        elif scope["method"] == "POST" and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            app = PlainTextResponse("pages of other sites may not search here", status_code=403)
        await app(scope, receive, send_guarded)

    def _is_meant_for_us(self, headers: Headers, path: str) -> bool:
        # Health probes come by whatever address, and learn nothing that is secret.
        if self._hosts is None or path == "/healthz":
            return True
        try:
            return urlsplit(f"//{headers.get('host', '')}").hostname in self._hosts
        except ValueError:
            return False
