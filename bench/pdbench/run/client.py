"""The HTTP client of the hot path: it sends, stamps every read, and leaves the reading to others.

Two things make it differ from a plain aiohttp client.

*Stamps.* Bytes are stamped in the protocol's ``data_received``, before any coroutine runs, and kept as they came; the
task that sent the request sleeps until the response has ended. A busy event loop then delays a stamp by the time of
one callback, not by a queue of tasks.

*Delayed ACKs.* sglang-router 0.3.2 leaves Nagle's algorithm on. Over a kept-alive connection it sends the response's
head at once and holds the first chunk back until that head is acknowledged, and Linux delays the acknowledgement by
40 ms on a connection that has gone to and fro before. The first token then seems 40 ms late, and the chunks behind it
arrive in a lump. TCP_QUICKACK, set after the request is written and as the first bytes of the answer come in, makes
this end acknowledge at once; nothing more is written until the answer has ended, so once per request is enough.
Setting it before the request is written does not help: the write itself takes the connection back. Measured against
the router with a first token at 20 ms: direct 21.5 ms, plain keep-alive 65 ms, set before the write 65 ms, set at the
first read 23 ms, a new connection each time 23.5 ms. It was preferred to new connections because those cost a
handshake and a port for every request, on both sides. Where there is no TCP_QUICKACK, each connection is used once.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.client_proto import ResponseHandler

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)

#: seconds after which an idle connection is dropped: below the 5 s after which uvicorn, and so SGLang, closes it
_KEEPALIVE_S = 4.0
#: connections opened at the same time when they are opened ahead; more would overflow a short accept queue
_OPEN_BATCH = 64
#: bytes held before aiohttp would stop reading: never, the response is read in full whatever its size
_READ_BUFFER = 2**30


@dataclass(slots=True)
class Exchange:
    """One request and its answer; times are `time.perf_counter` seconds, ``sent`` is NaN when nothing was written.

    ``reads`` holds (time, bytes of the body) for each read; ``error`` is "" when the response ended as HTTP says.
    """

    sent: float = float("nan")
    status: int = 0
    content_type: str = ""
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    heard: bool = False
    error: str = ""


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


class _Stamping(ResponseHandler):
    exchange: Exchange | None = None

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        exchange = self.exchange
        if exchange is None or not data:
            super().data_received(data)
            return
        if not exchange.heard:
            exchange.heard = True
            self._acknowledge_at_once()
        super().data_received(data)
        payload = self._payload
        if payload is not None and payload.exception() is None:
            part = payload.read_nowait()
            if part:
                exchange.reads.append((now, part))

    def resume_reading(self, resume_parser: bool = True) -> None:
        # aiohttp asks for this whenever bytes are taken, and goes through its parser each time; nothing was paused here.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def _acknowledge_at_once(self) -> None:
        sock = self.transport.get_extra_info("socket") if self.transport else None
        if sock is not None and _QUICKACK is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)


class _Connector(aiohttp.TCPConnector):
    """Makes stamping connections, opens some ahead, and ties each to the exchange of the task that takes it."""

    def __init__(self) -> None:
        once = {"force_close": True} if _QUICKACK is None else {"keepalive_timeout": _KEEPALIVE_S}
        super().__init__(limit=0, use_dns_cache=True, ttl_dns_cache=None, **once)
        self._factory = functools.partial(_Stamping, loop=asyncio.get_running_loop())  # type: ignore[assignment]
        self._like: tuple[ClientRequest, aiohttp.ClientTimeout] | None = None

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout) -> Connection:
        connection = await super().connect(req, traces, timeout)
        self._like = (req, timeout)
        exchange = _current.get()
        protocol = connection.protocol
        if isinstance(protocol, _Stamping):
            protocol.exchange = exchange
        if exchange is not None:
            exchange.sent = perf_counter()
        return connection

    async def open_ahead(self, count: int) -> None:
        """Have ``count`` connections ready to where the last request went."""
        if self._like is None or self.force_close:
            return
        req, timeout = self._like
        held: list[Connection] = []
        refused = False
        while len(held) < count and not refused:
            batch = min(_OPEN_BATCH, count - len(held))
            tries = (super(_Connector, self).connect(req, [], timeout) for _ in range(batch))
            made = [c for c in await asyncio.gather(*tries, return_exceptions=True) if not isinstance(c, BaseException)]
            held += made
            refused = len(made) < batch
        for connection in held:
            connection.release()


class Client:
    """Posts JSON to one server and returns what came back, with the time of every read."""

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float) -> None:
        """Prepare for ``url`` (scheme, host and port); a request may last ``timeout_s`` seconds in all."""
        self._url = url
        self._timeout_s = timeout_s
        self._connector = _Connector()
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity", **headers},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(timeout_s, 30.0)),
            read_bufsize=_READ_BUFFER,
            # Cookies would cost time in every request, and a proxy is not what is to be measured.
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    async def open_ahead(self, count: int) -> None:
        """Have ``count`` connections open, so that no measured request waits for a handshake.

        The kind of connection is learnt from a request made before. A server that refuses some is left to the requests,
        which will say so.
        """
        await self._connector.open_ahead(count)

    async def post(self, path: str, body: bytes, exchange: Exchange) -> None:
        """Send one request and wait until its response has ended; everything learnt is in ``exchange``.

        Failures are put into ``exchange.error`` rather than raised. A cancelled call leaves what had come so far.
        There is no second try: a request that fails is a result.
        """
        token = _current.set(exchange)
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.post(self._url + path, data=body, allow_redirects=False) as response,
            ):
                exchange.status = response.status
                exchange.content_type = response.headers.get("Content-Type", "").lower()
                content = response.content
                broken = content.exception()
                if broken is not None:
                    raise broken
                await content.wait_eof()
                rest = content.read_nowait()
                if rest:
                    exchange.reads.append((perf_counter(), rest))
        except TimeoutError:
            exchange.error = f"timeout: no complete answer after {self._timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as why:
            exchange.error = _broken(why, exchange)
        finally:
            _current.reset(token)


def _broken(why: BaseException, exchange: Exchange) -> str:
    if isinstance(why, aiohttp.ClientPayloadError):
        return "truncated: the connection ended before the response did"
    if isinstance(why, aiohttp.ServerDisconnectedError):
        return "disconnected: the server closed the connection without an answer"
    where = "reset: the connection broke" if exchange.sent == exchange.sent else "not connected"
    return f"{where}: {why or type(why).__name__}"
