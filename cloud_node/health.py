"""How a node does, over HTTP on an address of its own: /metrics, /healthz and /readyz.

Answered by the node's own event loop, so that an answer proves that it turns. Promises that nobody
who connects can hold it up: a request is a few kilobytes and one answer, everything has a time
limit, and of too many connections the oldest is dropped, which no honest one is for long. There is
no password and no encryption: the address is meant to be this machine's or a private network's.
"""

from __future__ import annotations

import asyncio
import logging

from cloud_node.exposition import CONTENT_TYPE, exposition, registry
from cloud_node.metrics import Metrics
from cloud_node.settings import split_address
from edge_common.errors import ConfigError

log = logging.getLogger(__name__)

REQUEST_S = 5.0
"""A connection may take so long, from its first byte to the last of the answer."""

CONNECTIONS = 32
"""So many at once; probes and scrapers need one each, for milliseconds."""

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


class Endpoint:
    """The HTTP side of a node; start it with :meth:`open`.

    Attributes:
        address: where it listens, as HOST:PORT, once it does.
    """

    def __init__(self, metrics: Metrics, version: str) -> None:
        self.address = ""
        self._metrics = metrics
        self._registry = registry(metrics, version)
        self._server: asyncio.AbstractServer | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def open(self, address: str) -> None:
        """Listen on HOST:PORT.

        Raises:
            ConfigError: that is not possible.
        """
        host, port = split_address(address)
        try:
            self._server = await asyncio.start_server(
                self._connected, host, port, limit=_REQUEST_BYTES, backlog=CONNECTIONS
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address} for metrics: {error.strerror or error}; choose "
                "another address (--metrics), or off"
            ) from None
        host, port = self._server.sockets[0].getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        log.info("metrics at http://%s/metrics", self.address)

    async def close(self) -> None:
        """Stop listening and drop whoever is connected."""
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
            # Its end need not come at once; it counts no more.
            self._connections.pop(oldest).transport.abort()
        try:
            await asyncio.wait_for(self._serve(reader, writer), REQUEST_S)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            writer.transport.abort()
        except Exception:  # no connection outlives whoever is to end it
            log.exception("a request for health or metrics could not be answered")
            writer.transport.abort()
        except asyncio.CancelledError:
            # Only `close` does that. (A task that ends as cancelled would be reported as an error.)
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
        """The answer to a request, None if it was too long."""
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
            ready = self._metrics.ready
            return _response(200 if ready else 503, f"{self._metrics.state}\n", head=head)
        if path == b"/metrics":
            return _response(200, exposition(self._registry), CONTENT_TYPE, head=head)
        return _response(404, "there are /metrics, /healthz and /readyz\n", head=head)


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
