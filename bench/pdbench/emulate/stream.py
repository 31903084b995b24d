"""Tokens from the engine straight to the client's socket: no coroutine and no aiohttp writer per token.

aiohttp reads the request and decides when a connection ends; the reply's bytes are ours. A token costs one call of the
sink and one `write(2)`, so that the moment in which the engine notes its lateness is the moment in which it was sent.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus

from aiohttp import HttpVersion11, web

from pdbench.emulate.faults import Faults
from pdbench.emulate.job import Job, now
from pdbench.emulate.replies import Ending, Frame, Reply, Stream

#: What one client may leave unread, in bytes, beyond what the kernel holds for it. A stream of 10 000 tokens of
#: `/v1/completions` fits; a client that is further behind is not coming back.
UNREAD_LIMIT = 4 * 2**20
_LAST_CHUNK = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Return one chunk of HTTP/1.1's chunked encoding (RFC 9112, 7.1); data that is not empty, for an empty one ends all."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _as_is(data: bytes) -> bytes:
    return data


class Wire(web.StreamResponse):
    """A streamed response that is written to the socket itself; aiohttp only learns that it is over.

    Bytes go out by `write(2)` while the transport has nothing of its own to send. The first time that the kernel does
    not take all, the rest and everything after it go through the transport, which keeps the order.
    """

    def __init__(self, request: web.Request, faults: Faults, on_slow: Callable[[], None]) -> None:
        """Take the connection of a request. `on_slow` is called when its client did not read and was cut off."""
        super().__init__()
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        self._transport, self._faults, self._on_slow = transport, faults, on_slow
        self._socket = transport.get_extra_info("socket").fileno()
        self._direct = False
        self._held: list[bytes] = []
        chunked = request.version >= HttpVersion11
        self._stays = chunked and request.keep_alive
        self.frame: Frame = chunk if chunked else _as_is
        self._tail = _LAST_CHUNK if chunked else b""
        self._head = _head(chunked, self._stays)

    async def settle(self) -> None:
        """Wait until everything that was sent on this connection before has left it."""
        # uvloop hands over what transport.write got at the end of a turn of the loop, not counted by the buffer's size
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._direct = self._transport.get_write_buffer_size() == 0

    def send(self, data: bytes) -> None:
        """Send framed bytes, after the headers when these are the first. Never waits, never raises."""
        if self._head:
            data, self._head = self._head + data, b""
        if not self._faults.quiet and self._hold(data):
            return
        if self._held:
            data = b"".join([*self._held, data])
            self._held.clear()
        # A closing transport's descriptor may soon be another client's.
        if self._transport.is_closing():
            return
        if self._direct:
            try:
                sent = os.write(self._socket, data)
            except BlockingIOError:
                sent = 0
            except OSError:  # the client has left: the transport finds out when it reads
                return
            if sent == len(data):
                return
            self._direct = False
            data = data[sent:]
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > UNREAD_LIMIT:
            self._cut_off()

    def _hold(self, data: bytes) -> bool:
        if not self._faults.hanging:
            return False
        self._held.append(data)
        if sum(map(len, self._held)) > UNREAD_LIMIT and not self._transport.is_closing():
            self._cut_off()
        return True

    def _cut_off(self) -> None:
        self._on_slow()
        if isinstance(self._transport, asyncio.WriteTransport):
            self._transport.abort()

    def finish(self, data: bytes) -> None:
        """Send the last framed bytes and end the body."""
        self.send(data + self._tail)

    # What aiohttp asks of a response.

    @property
    def keep_alive(self) -> bool:
        """Whether the connection can take another request."""
        return self._stays

    @property
    def prepared(self) -> bool:
        """True: nobody else is to send headers."""
        return True

    async def prepare(self, request: web.BaseRequest) -> None:
        """Do nothing: the headers are ours."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: the end is ours."""


def _head(chunked: bool, stays: bool) -> bytes:
    lines = [
        f"HTTP/1.{int(chunked)} {HTTPStatus.OK.value} {HTTPStatus.OK.phrase}",
        "Content-Type: text/event-stream",
        "Cache-Control: no-cache",
        f"Date: {formatdate(usegmt=True)}",
        *(["Transfer-Encoding: chunked"] if chunked else []),
        *([] if stays else ["Connection: close"]),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


class Counting:
    """A sink that only counts: for a reply that is not streamed."""

    def __init__(self, faults: Faults) -> None:
        """Start at no token."""
        self.sent = 0
        self._faults = faults

    def token(self, job: Job, index: int, last: bool) -> None:
        """Note that the token is there."""
        self.sent = index + 1
        if not self._faults.quiet:
            self._faults.tokens_sent(1)

    def ending(self, job: Job, arrival: float, aborted: str = "") -> Ending:
        """Return how the item ended that arrived at `arrival` on the clock of `job.now`."""
        return Ending(job.digest or bytes(32), self.sent, job.cached_tokens, now() - arrival, aborted)


class Streaming(Counting):
    """The sink of one streamed item."""

    def __init__(self, reply: Reply, place: int, wire: Wire, faults: Faults, arrival: float) -> None:
        """Start without a token."""
        super().__init__(faults)
        self._reply, self._place, self._wire, self._arrival = reply, place, wire, arrival
        self._stream: Stream | None = None

    def token(self, job: Job, index: int, last: bool) -> None:
        """Send one token, with the finish reason when it is the last."""
        stream = self._stream
        if stream is None:
            stream = self._stream = self._reply.stream(self._place, job.digest, job.cached_tokens)
        self.sent = index + 1
        self._wire.send(stream.last(self.ending(job, self._arrival), True) if last else stream.token(index))
        if not self._faults.quiet:
            self._faults.tokens_sent(1)

    def abort(self, job: Job, message: str) -> None:
        """Tell the client that this item ends early."""
        ending = self.ending(job, self._arrival, message)
        stream = self._stream or self._reply.stream(self._place, ending.digest)
        self._wire.send(stream.last(ending, False))
