"""The hot path: HTTP/1.1 over epoll in one thread. It sends, stamps what arrives, keeps it, and reads nothing of it.

*No event loop.* A readiness event costs one system call, one pass through llhttp (which finds the end of the answer) and
two appends. asyncio, uvloop and aiohttp put a transport, a protocol, a stream and a task between the socket and the stamp.

*Stamps are the kernel's.* With SO_TIMESTAMPNS every read comes with the time at which its last segment arrived, so that a
busy process reads late but does not stamp late. What is read in one go has one stamp, its last segment's. Where the kernel
gives none (TLS, another system), the time of the read stands in. The delay between the two is kept: it is what the figures
would have been off by, and says how busy this process is.

*Delayed ACKs.* sglang-router 0.3.2 leaves Nagle's algorithm on. Over a kept-alive connection it sends the response's
head at once and holds the first chunk back until that head is acknowledged, and Linux delays the acknowledgement by
40 ms on a connection that has gone to and fro before. The first token then seems 40 ms late, and the chunks behind it
arrive in a lump. TCP_QUICKACK, set after the request is written and as the first bytes of the answer come in, makes
this end acknowledge at once; nothing more is written until the answer has ended, so once per request is enough.
Setting it before the request is written does not help: the write itself takes the connection back. Measured against
the router with a first token at 20 ms: direct 21.5 ms, plain keep-alive 65 ms, set before the write 65 ms, set at the
first read 23 ms, a new connection each time 23.5 ms.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
import time
from collections import Counter, deque
from collections.abc import Callable
from time import perf_counter
from urllib.parse import urlsplit

import httptools

from pdbench.run.exchange import Endpoint, Exchange
from pdbench.trust import trusting

#: seconds after which an idle connection is dropped: below the 5 s after which uvicorn, and so SGLang, closes it
_KEEPALIVE_S = 4.0
#: connections opened at the same time when they are opened ahead; more would overflow a short accept queue
_OPEN_BATCH = 64
_CONNECT_S = 30.0
_READ_BYTES = 1 << 16
#: SO_TIMESTAMPNS_OLD of Linux (asm-generic/socket.h) gives a struct timespec of two longs, 16 bytes
_SO_TIMESTAMPNS = 35
_TIMESPEC = struct.Struct("@ll")
_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)
#: read delays are counted in steps of 0.1 ms
LAG_STEPS = 10_000
#: seconds after which `poll` returns though nothing has happened
_TICK_S = 0.01
#: two readings of one clock that are further apart than this, in s, had something between them; and how often to try
_CLOCKS_APART_S, _CLOCK_READS = 20e-6, 4


def clocks() -> tuple[float, float]:
    """Return `perf_counter`, and how far `time.time` is behind it, in s: two clocks read with nothing between them.

    A process that loses its core between the two would stamp everything that it then reads as early as it was away; whoever
    asks a clock twice sees that, and asks again (a few times at most: the closest pair counts).
    """
    behind, apart, now = 0.0, float("inf"), 0.0
    for _ in range(_CLOCK_READS):
        before, wall, now = perf_counter(), time.time(), perf_counter()
        if now - before < apart:
            behind, apart = (before + now) / 2 - wall, now - before
        if apart < _CLOCKS_APART_S:
            break
    return now, behind


class _Connection:
    """One connection, and what its parser tells."""

    __slots__ = (
        "body",
        "complete",
        "content_type",
        "exchange",
        "framed",
        "headed",
        "heard",
        "idle_since",
        "kept",
        "out",
        "parser",
        "ready",
        "sock",
    )

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.exchange: Exchange | None = None
        self.out: memoryview | None = None
        self.ready = False
        self.idle_since = 0.0
        self.body: list[bytes] = []
        self.fresh()

    def fresh(self) -> None:
        """Expect the head of an answer."""
        self.parser = httptools.HttpResponseParser(self)
        self.complete = self.framed = self.headed = self.heard = self.kept = False
        self.content_type = ""

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self.content_type = value.decode("latin-1").lower()
        elif name in (b"content-length", b"transfer-encoding"):
            self.framed = True

    def on_headers_complete(self) -> None:
        self.headed = True

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        # 1xx announces the answer, it is none.
        self.complete = self.parser.get_status_code() >= 200
        self.kept = self.parser.should_keep_alive()


class Wire:
    """Exchanges with one server. Every request given to `post` comes back once, through ``ended``; there is no second try.

    ``ended`` may call `post`. Nothing happens but in `post` and `poll`.
    """

    def __init__(self, endpoint: Endpoint, ended: Callable[[Exchange], None]) -> None:
        """Look the server's address up; raise OSError when it has none."""
        self._endpoint = endpoint
        self._head = endpoint.head()
        self._ended = ended
        parts = urlsplit(endpoint.url)
        self._host = parts.hostname or ""
        self._tls = trusting(endpoint.ca) if parts.scheme == "https" else None
        port = parts.port or (443 if self._tls else 80)
        self._addresses = socket.getaddrinfo(self._host, port, type=socket.SOCK_STREAM)
        self._epoll = select.epoll()
        self._all: dict[int, _Connection] = {}
        self._idle: list[_Connection] = []
        self._deadlines: deque[tuple[float, Exchange]] = deque()
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._reached = False
        self.in_flight = 0
        self.stamped = self.reads = 0
        self._away = 0.0
        self.lags: Counter[int] = Counter()

    def close(self) -> None:
        """Close every connection."""
        for connection in list(self._all.values()):
            self._drop(connection)
        self._epoll.close()

    def watch(self, fd: int) -> None:
        """Return from `poll` when ``fd`` can be read, too."""
        self._epoll.register(fd, select.EPOLLIN)

    def post(self, exchange: Exchange, body: bytes | memoryview) -> None:
        """Send a request; ``exchange`` says later what came of it."""
        self.in_flight += 1
        self._deadlines.append((perf_counter() + self._endpoint.timeout_s, exchange))
        connection = self._take()
        try:
            if connection is None:
                connection = self._open()
        except OSError as why:
            self._end(exchange, _not_connected(why))
            return
        exchange.connection, connection.exchange = connection, exchange
        if connection.ready:
            self._begin(connection, exchange, body)
        else:
            connection.out = memoryview(body)

    def open_ahead(self, count: int) -> None:
        """Have ``count`` connections open, so that no measured request waits for a handshake.

        A server that refuses some is left to the requests, which will say so.
        """
        give_up = perf_counter() + _CONNECT_S
        for connection in [c for c in self._idle if c.idle_since < give_up - _CONNECT_S - _KEEPALIVE_S]:
            self._drop(connection)
        while (missing := count - len(self._idle)) > 0 and perf_counter() < give_up:
            before = len(self._all)
            try:
                for _ in range(min(missing, _OPEN_BATCH)):
                    self._open()
            except OSError:
                return
            opened = len(self._all) - before
            while any(not c.ready for c in self._all.values()) and perf_counter() < give_up:
                self.poll(0.05)
            if len(self._all) < before + opened:
                return

    def poll(self, timeout: float) -> bool:
        """Handle what has arrived, waiting for ``timeout`` seconds at most; tell whether a watched descriptor is readable."""
        now = perf_counter()
        if self._deadlines:
            timeout = min(timeout, self._expire(now) - now)
        timeout = max(0.0, min(timeout, _TICK_S))
        if timeout:
            # epoll counts in milliseconds and would send up to one too late; select on it counts in microseconds.
            select.select([self._epoll], [], [], timeout)
        called = False
        happened = self._epoll.poll(0)
        # Both clocks within the same batch: a step of the real one spoils no stamp but this batch's, and is seen below.
        polled, behind = clocks()
        # A read's stamp is its last segment's, and says nothing of those before it: how long this process was away does.
        self._away = max(0.0, polled - now - timeout)
        if not happened:
            self.lags[int(self._away * LAG_STEPS)] += 1
            return False
        for fd, mask in happened:
            connection = self._all.get(fd)
            if connection is None:
                called = called or fd not in self._all
                continue
            if mask & ~select.EPOLLOUT and connection.ready:
                self._read(connection, polled, behind)
            elif not connection.ready:
                self._connected(connection)
            elif connection.out is not None:
                self._write(connection)
        return called

    def stop(self, why: str) -> None:
        """End everything in flight with ``why``."""
        for connection in list(self._all.values()):
            exchange = connection.exchange
            if exchange is not None:
                self._drop(connection)
                self._end(exchange, why)

    # --- connections

    def _take(self) -> _Connection | None:
        oldest = perf_counter() - _KEEPALIVE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.sock.fileno() >= 0 and connection.idle_since >= oldest:
                return connection
            self._drop(connection)
        return None

    def _open(self) -> _Connection:
        family, kind, protocol, _, address = self._addresses[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is None:
                sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            failed = sock.connect_ex(address)
            if failed not in (0, errno.EINPROGRESS):
                raise OSError(failed, os.strerror(failed))
        except OSError:
            sock.close()
            raise
        connection = _Connection(sock)
        self._all[sock.fileno()] = connection
        self._epoll.register(sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        return connection

    def _connected(self, connection: _Connection) -> None:
        failed = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            self._refused(connection, OSError(failed, os.strerror(failed)))
            return
        try:
            connection.sock.getpeername()
        except OSError:  # not yet: the event was an earlier connection's, of the same number and in the same batch
            return
        if self._tls is not None and not self._handshake(connection, self._tls):
            return
        self._reached = connection.ready = True
        self._epoll.modify(connection.sock.fileno(), select.EPOLLIN)
        exchange = connection.exchange
        if exchange is None:
            self._release(connection)
        else:
            body, connection.out = connection.out, None
            self._begin(connection, exchange, body or b"")

    def _handshake(self, connection: _Connection, context: ssl.SSLContext) -> bool:
        fd = connection.sock.fileno()
        try:
            if not isinstance(connection.sock, ssl.SSLSocket):
                # The new object takes the descriptor over.
                connection.sock = context.wrap_socket(connection.sock, server_hostname=self._host, do_handshake_on_connect=False)
            connection.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._epoll.modify(fd, select.EPOLLIN)
            return False
        except ssl.SSLWantWriteError:
            self._epoll.modify(fd, select.EPOLLOUT)
            return False
        except OSError as why:
            self._refused(connection, why)
            return False
        return True

    def _refused(self, connection: _Connection, why: OSError) -> None:
        exchange, body = connection.exchange, connection.out
        self._drop(connection)
        if not self._reached and len(self._addresses) > 1:
            del self._addresses[0]  # a name with several addresses, the first of which nobody answers at
            if exchange is not None:
                self.in_flight -= 1
                exchange.connection = None
                self.post(exchange, body or b"")
            return
        if exchange is not None:
            self._end(exchange, _not_connected(why))

    def _release(self, connection: _Connection) -> None:
        connection.exchange = None
        connection.idle_since = perf_counter()
        self._idle.append(connection)

    def _drop(self, connection: _Connection) -> None:
        fd = connection.sock.fileno()
        if fd >= 0:
            self._all.pop(fd, None)
            connection.sock.close()  # leaves the epoll set by itself
            # Nothing that holds itself, or a part of the file of bodies, is left behind: senders run without a collector.
            connection.out = None
            del connection.parser
        if connection.exchange is None and connection in self._idle:
            self._idle.remove(connection)
        connection.exchange = None

    # --- a request's way out

    def _begin(self, connection: _Connection, exchange: Exchange, body: bytes | memoryview) -> None:
        head = b"%s%d\r\n\r\n" % (self._head, len(body))
        exchange.sent = perf_counter()
        try:
            plain = self._tls is None
            written = connection.sock.sendmsg([head, body]) if plain else connection.sock.send(head + bytes(body))
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            written = 0
        except OSError as why:
            self._break(connection, why)
            return
        if written < len(head) + len(body):
            connection.out = memoryview(head + bytes(body))[written:]
            self._epoll.modify(connection.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        else:
            self._acknowledge_at_once(connection)

    def _write(self, connection: _Connection) -> None:
        assert connection.out is not None
        try:
            connection.out = connection.out[connection.sock.send(connection.out) :]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return
        except OSError as why:
            self._break(connection, why)
            return
        if not connection.out:
            connection.out = None
            self._epoll.modify(connection.sock.fileno(), select.EPOLLIN)
            self._acknowledge_at_once(connection)

    def _acknowledge_at_once(self, connection: _Connection) -> None:
        if _QUICKACK is not None:
            connection.sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)

    # --- an answer's way in

    def _read(self, connection: _Connection, polled: float, behind: float) -> None:
        exchange = connection.exchange
        try:
            if exchange is None:
                # The server closes an idle connection, or says something that nobody asked for; a TLS ticket raises.
                connection.sock.recv_into(self._buffer)
                self._drop(connection)
                return
            if self._tls is not None:
                # A TLS record may hold more than one read takes, and epoll knows nothing of what is left of it.
                while connection.exchange is exchange:
                    size = connection.sock.recv_into(self._buffer)
                    stamp = perf_counter()
                    self.lags[int((stamp - polled + self._away) * LAG_STEPS)] += 1
                    self._take_in(connection, exchange, size, stamp)
                return
            size, told, _, _ = connection.sock.recvmsg_into([self._buffer], 64)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as why:
            self._break(connection, why)
            return
        now = stamp = perf_counter()
        late = now - polled
        if told:
            seconds, nanoseconds = _TIMESPEC.unpack(told[0][2])
            arrived = seconds + behind + nanoseconds * 1e-9
            # Between sending and now, or a clock was set: then the read itself is the best that is known.
            if exchange.sent <= arrived <= now:
                # The distance of the clocks is read anew with every batch, a microsecond more or less: time stays in order.
                stamp = max(arrived, exchange.stamps[-1]) if exchange.stamps else arrived
                late = now - arrived
                self.stamped += 1
        self.lags[int(max(late, self._away) * LAG_STEPS)] += 1
        self._take_in(connection, exchange, size, stamp)

    def _take_in(self, connection: _Connection, exchange: Exchange, size: int, stamp: float) -> None:
        self.reads += 1
        if not size:
            self._eof(connection, exchange)
            return
        if not connection.heard:
            connection.heard = True
            self._acknowledge_at_once(connection)
        try:
            connection.parser.feed_data(self._view[:size])
        except httptools.HttpParserError as why:
            self._drop(connection)
            self._end(exchange, f"not HTTP: {why}")
            return
        body = connection.body
        if body:
            exchange.stamps.append(stamp)
            exchange.lengths.append(len(body[0]) if len(body) == 1 else sum(map(len, body)))
            exchange.parts += body
            body.clear()
        if connection.complete:
            self._answered(connection, exchange)

    def _answered(self, connection: _Connection, exchange: Exchange) -> None:
        self._note(connection, exchange)
        if connection.kept and connection.out is None and _QUICKACK is not None:
            connection.fresh()
            self._release(connection)
        else:
            self._drop(connection)
        self._end(exchange, "")

    def _eof(self, connection: _Connection, exchange: Exchange) -> None:
        if not connection.heard:
            error = "disconnected: the server closed the connection without an answer"
        elif connection.framed or not connection.headed:
            error = "truncated: the connection ended before the response did"
        else:
            error = ""  # neither a length nor chunks: the end of the connection is the end of the answer
        self._note(connection, exchange)
        self._drop(connection)
        self._end(exchange, error)

    def _break(self, connection: _Connection, why: OSError) -> None:
        exchange = connection.exchange
        if exchange is not None:
            self._note(connection, exchange)
        self._drop(connection)
        if exchange is not None:
            self._end(exchange, f"reset: the connection broke: {why.strerror or why}")

    def _note(self, connection: _Connection, exchange: Exchange) -> None:
        if connection.headed:
            exchange.status = connection.parser.get_status_code()
            exchange.content_type = connection.content_type

    def _expire(self, now: float) -> float:
        """End what has lasted too long; return when the next request will have."""
        while self._deadlines:
            due, exchange = self._deadlines[0]
            if exchange.ended == exchange.ended:
                self._deadlines.popleft()
            elif due <= now:
                self._deadlines.popleft()
                connection = exchange.connection
                if isinstance(connection, _Connection):
                    self._note(connection, exchange)
                    self._drop(connection)
                self._end(exchange, f"timeout: no complete answer after {self._endpoint.timeout_s:g} s")
            else:
                return due
        return now + _CONNECT_S

    def _end(self, exchange: Exchange, error: str) -> None:
        exchange.connection = None
        exchange.ended = perf_counter()
        exchange.error = error
        self.in_flight -= 1
        self._ended(exchange)


def _not_connected(why: OSError) -> str:
    raise_it = {
        errno.EMFILE: ": raise the limit of open files (ulimit -n, LimitNOFILE=)",
        errno.EADDRNOTAVAIL: ": no local port is left (sysctl net.ipv4.ip_local_port_range)",
    }
    return f"not connected: {why.strerror or why}{raise_it.get(why.errno or 0, '')}"
