"""The health of a long-running process over HTTP: /metrics, /healthz and /readyz.

There is no password and no encryption: use an address of this machine or of a private network.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from prometheus_client import CollectorRegistry

from edge_common.errors import ConfigError
from edge_common.metrics import CONTENT_TYPE, exposition

log = logging.getLogger(__name__)

REQUEST_S = 5.0
"""Time limit of a connection, from its first byte to the last of the answer."""

CONNECTIONS = 32
"""Open at once at most; one too many drops the oldest. A probe or scrape needs milliseconds."""

_REQUEST_BYTES = 8192
_PHRASES = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}
_PLAIN = "text/plain; charset=utf-8"


class Health(Protocol):
    """The health of a process, for people and service managers."""

    @property
    def ready(self) -> bool:
        """True if it accepts work."""

    @property
    def state(self) -> str:
        """One word. ``draining`` means that it stops."""

    @property
    def summary(self) -> str:
        """The state in some more words."""


class Endpoint:
    """The HTTP server, answered by the event loop of the process: an answer proves that it runs.

    Attributes:
        address: HOST:PORT once it listens.
    """

    def __init__(self, health: Health, registry: CollectorRegistry) -> None:
        self.address = ""
        self._health, self._registry = health, registry
        self._server: asyncio.AbstractServer | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def open(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be used.
        """
        try:
            self._server = await asyncio.start_server(
                self._connected, host, port, limit=_REQUEST_BYTES, backlog=CONNECTIONS
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {_address(host, port)} for metrics: {error.strerror or error}",
                mend="choose another address (--metrics), or off",
            ) from None
        self.address = _address(*self._server.sockets[0].getsockname()[:2])
        log.info("metrics at http://%s/metrics", self.address)

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        if self._server:
            self._server.close()
        for task in [*self._connections]:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._server:
            await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._connections[task] = writer
        if len(self._connections) > CONNECTIONS:
            oldest = next(iter(self._connections))
            # Its task may end later, but it no longer counts.
            self._connections.pop(oldest).transport.abort()
        try:
            await asyncio.wait_for(self._serve(reader, writer), REQUEST_S)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            writer.transport.abort()
        except Exception:
            log.exception("a request for health or metrics could not be answered")
            writer.transport.abort()
        except asyncio.CancelledError:
            # Only `close` cancels. A task that ends as cancelled would be logged as an error.
            writer.transport.abort()
        finally:
            self._connections.pop(task, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            request = None
        writer.write(self._answer(request))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    def _answer(self, request: bytes | None) -> bytes:
        """The answer to a request. None is a request that was too long."""
        if request is None:
            return _response(431, f"at most {_REQUEST_BYTES} bytes\n")
        words = request.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(400, "expected an HTTP/1 request\n")
        method, target, _ = words
        if method not in (b"GET", b"HEAD"):
            return _response(405, "GET only\n", extra="Allow: GET, HEAD\r\n")
        path = target.split(b"?", 1)[0]
        head = method == b"HEAD"
        if path == b"/healthz":
            return _response(200, "ok\n", head=head)
        if path == b"/readyz":
            status = 200 if self._health.ready else 503
            return _response(status, f"{self._health.state}\n", head=head)
        if path == b"/metrics":
            return _response(200, exposition(self._registry), CONTENT_TYPE, head=head)
        return _response(404, "there are /metrics, /healthz and /readyz\n", head=head)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _response(
    status: int, body: str | bytes, kind: str = _PLAIN, *, extra: str = "", head: bool = False
) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    lines = (
        f"HTTP/1.1 {status} {_PHRASES[status]}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(data)}\r\nCache-Control: no-store\r\n{extra}"
        "Connection: close\r\n\r\n"
    )
    return lines.encode() + (b"" if head else data)
