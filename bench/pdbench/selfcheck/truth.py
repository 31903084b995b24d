"""A server that knows when it sent what: the truth that the load generator is calibrated against.

    python -m pdbench.selfcheck.truth [HOST] PORT

Token n of an answer is due ``ttft + n * itl`` after the request was read. What counts is not this schedule but the log: the
server notes when it read a request and when it handed the first and the last token to the kernel, so that its own lateness is
no error of the client's. It says ``port N`` when it listens, and ends when its standard input does, so that it never outlives
who started it.

It is one process with one epoll loop and nothing but the standard library; what it sends is made before it is due. Three things
keep the log true. All sockets are read, and stamped, before any request is looked at. At most `_BURST` tokens go out between two
looks at the sockets. And the garbage collector is off.

``POST /v1/completions`` (streamed, token ids or text) and ``/v1/chat/completions``; the model's name holds the timing:
``truth,ttft=50,itl=20`` (milliseconds). ``GET /log?after=N`` returns the requests that ended, from number N on; the rest is 200.
The text of answer number N is `answer_text`: a client's record of it names the answer.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import json
import os
import re
import resource
import select
import socket
import sys
import time
from dataclasses import dataclass, field
from functools import lru_cache

from pdbench.reading import json_of

#: tokens sent between two looks at the sockets: 64 take half a millisecond
_BURST = 64
_READ = 1 << 16
_MOST_BODY = 1 << 26
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
_OTHER = " the"
#: columns of a row of the log; times are nanoseconds on the server's monotonic clock
COLUMNS = ("number", "read_ns", "first_ns", "last_ns", "tokens", "late_max_ns", "late_sum_ns", "blind_ns")


def model_name(ttft_ms: float, itl_ms: float) -> str:
    """Return the model's name that asks for this timing."""
    return f"truth,ttft={ttft_ms:g},itl={itl_ms:g}"


def answer_text(number: int, tokens: int) -> str:
    """Return the text of answer ``number``."""
    return f" {number}" + _OTHER * (tokens - 1)


class _BadRequestError(Exception):
    """The request is not one of ours; the message says why."""


@lru_cache(maxsize=16)
def _events(chat: bool, prompt: int, total: int, usage_last: bool) -> list[bytes]:
    """Return the chunks of an answer from its second token on; the last holds all that follows, too."""
    chunks = [_chunk(_event(chat, _OTHER, n, prompt, n == total)) for n in range(2, total + 1)]
    if chunks:
        chunks[-1] += _end(chat, prompt, total, usage_last)
    return chunks


def _event(chat: bool, text: str, so_far: int, prompt: int, last: bool) -> bytes:
    words: dict[str, object] = {"delta": {"content": text}} if chat else {"text": text}
    return _data(
        {
            "id": "truth",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 0,
            "model": "truth",
            "choices": [{"index": 0, **words, "logprobs": None, "finish_reason": "length" if last else None}],
            "usage": _usage(prompt, so_far),
        }
    )


def _end(chat: bool, prompt: int, total: int, usage_last: bool) -> bytes:
    """Return what follows the last token: the usage on its own where it was asked for, ``[DONE]``, the end of the body."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    usage = {"id": "truth", "object": kind, "model": "truth", "choices": [], "usage": _usage(prompt, total)}
    return (_chunk(_data(usage)) if usage_last else b"") + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _usage(prompt: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def _data(value: object) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(payload), payload)


@dataclass(slots=True, eq=False)
class _Conn:
    """A connection and the answer that is going over it (``total`` 0: none)."""

    sock: socket.socket
    read: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    read_ns: int = 0
    blind_ns: int = 0
    number: int = 0
    total: int = 0
    sent: int = 0
    head: bytes = b""
    events: list[bytes] = field(default_factory=list)
    start_ns: int = 0
    ttft_ns: int = 0
    itl_ns: int = 0
    first_ns: int = 0
    late_max_ns: int = 0
    late_sum_ns: int = 0
    open: bool = True


class Truth:
    """The server; `serve` returns when standard input ends."""

    def __init__(self, host: str, port: int) -> None:
        """Listen; port 0 takes a free one (`port` tells). Raise OSError."""
        self._listener = socket.create_server((host, port), family=socket.AF_INET, backlog=4096)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._poll = select.epoll()
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        self._conns: dict[int, _Conn] = {}
        self._due: list[tuple[int, int, _Conn]] = []
        self._log: list[tuple[int, ...]] = []
        self._number = 0

    def serve(self, stdin: int | None) -> None:
        """Serve until ``stdin`` ends (None: for ever)."""
        if stdin is not None:
            self._poll.register(stdin, select.EPOLLIN)
        gc.disable()
        looked = time.monotonic_ns()
        while True:
            if self._due:
                wait = (self._due[0][0] - time.monotonic_ns()) / 1e9
                # epoll waits whole milliseconds; select on it takes fractions of them.
                if wait > 0:
                    select.select([self._poll], [], [], wait)
                    looked = time.monotonic_ns()
            else:
                select.select([self._poll], [], [])
                looked = time.monotonic_ns()
            ready = self._poll.poll(0)
            now = time.monotonic_ns()
            if ready and self._read_all(ready, stdin, looked):
                return
            looked = now
            self._send_due()

    def _read_all(self, ready: list[tuple[int, int]], stdin: int | None, looked: int) -> bool:
        """Read every socket that is ready, then look at what came; tell whether standard input ended."""
        heard: list[_Conn] = []
        for fd, what in ready:
            conn = self._conns.get(fd)
            if conn is None:
                if fd == stdin:
                    if not os.read(fd, _READ):
                        return True
                else:
                    self._accept()
                continue
            if what & select.EPOLLOUT:
                self._flush(conn)
            if what & ~select.EPOLLOUT:
                try:
                    data = conn.sock.recv(_READ)
                except (BlockingIOError, InterruptedError):
                    continue
                except OSError:
                    data = b""
                conn.read_ns = time.monotonic_ns()
                conn.blind_ns = conn.read_ns - looked
                if data:
                    conn.read += data
                    heard.append(conn)
                else:
                    self._drop(conn)
        for conn in heard:
            self._take(conn)
        return False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(_BURST):
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._conns[sock.fileno()] = _Conn(sock)
                self._poll.register(sock.fileno(), select.EPOLLIN)

    def _take(self, conn: _Conn) -> None:
        """Begin to answer when a whole request is there and the one before it has its answer."""
        head_end = conn.read.find(b"\r\n\r\n")
        if conn.total or head_end < 0:
            return
        head = bytes(conn.read[:head_end])
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        end = head_end + 4 + size
        if len(conn.read) < end and size <= _MOST_BODY:
            return
        body = bytes(conn.read[head_end + 4 : end])
        del conn.read[:end]
        method, _, path = head.split(b"\r\n", 1)[0].partition(b" ")
        try:
            if size > _MOST_BODY:
                raise _BadRequestError("the body is too long")
            if method != b"POST":
                self._write(conn, _whole(b"200 OK", self._told(path.split(b" ")[0].decode("ascii", "replace"))))
            elif path.startswith((b"/v1/completions", b"/v1/chat/completions")):
                self._begin(conn, body, path.startswith(b"/v1/chat"))
            else:
                raise _BadRequestError("only /v1/completions and /v1/chat/completions are served here")
        except _BadRequestError as why:
            self._write(conn, _whole(b"400 Bad Request", {"error": {"message": str(why)}}))

    def _told(self, path: str) -> dict[str, object]:
        if not path.startswith("/log"):
            return {"status": "ok", "truth": 1}
        after = re.search(r"after=(\d+)", path)
        least = int(after[1]) if after else 0
        return {
            "columns": COLUMNS,
            "rows": [row for row in self._log if row[0] >= least],
            "next": self._number,
            "cpu_s": time.process_time(),
        }

    def _begin(self, conn: _Conn, body: bytes, chat: bool) -> None:
        try:
            asked = json_of(body)
            total = int(asked.get("max_completion_tokens") or asked["max_tokens"])
            prompt = asked["messages"][0]["content"] if chat else asked["prompt"]
            length = len(prompt.split() if isinstance(prompt, str) else prompt)
            timing = dict(word.split("=") for word in asked["model"].split(",")[1:])
            ttft_ns, itl_ns = (int(float(timing[name]) * 1e6) for name in ("ttft", "itl"))
            usage_last = bool((asked.get("stream_options") or {}).get("include_usage"))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as why:
            message = f"expected prompt, max_tokens and a model such as {model_name(50, 20)}: {type(why).__name__} {why}"
            raise _BadRequestError(message) from None
        if not (0 < total <= 1_000_000 and asked.get("stream") is True):
            raise _BadRequestError("expected stream: true and max_tokens from 1 to 1000000")
        conn.number, self._number = self._number, self._number + 1
        conn.total, conn.sent, conn.late_max_ns, conn.late_sum_ns = total, 0, 0, 0
        conn.start_ns, conn.ttft_ns, conn.itl_ns = conn.read_ns, ttft_ns, itl_ns
        conn.events = _events(chat, length, total, usage_last)
        conn.head = _HEAD + _chunk(_event(chat, f" {conn.number}", 1, length, total == 1))
        if total == 1:
            conn.head += _end(chat, length, total, usage_last)
        heapq.heappush(self._due, (conn.start_ns + ttft_ns, conn.number, conn))

    def _send_due(self) -> None:
        due, clock = self._due, time.monotonic_ns
        for _ in range(_BURST):
            if not due or due[0][0] > clock():
                return
            when, number, conn = due[0]
            if not conn.open:
                heapq.heappop(due)
                continue
            data = conn.events[conn.sent - 1] if conn.sent else conn.head
            now = clock()
            self._write(conn, data)
            if not conn.open:
                heapq.heappop(due)
                continue
            late = now - when
            conn.late_sum_ns += late
            if late > conn.late_max_ns:
                conn.late_max_ns = late
            if not conn.sent:
                conn.first_ns = now
            conn.sent += 1
            if conn.sent < conn.total:
                heapq.heapreplace(due, (conn.start_ns + conn.ttft_ns + conn.sent * conn.itl_ns, number, conn))
            else:
                heapq.heappop(due)
                self._ended(conn, now)

    def _ended(self, conn: _Conn, now: int) -> None:
        row = (conn.number, conn.start_ns, conn.first_ns, now, conn.total, conn.late_max_ns, conn.late_sum_ns, conn.blind_ns)
        self._log.append(row)
        conn.total = 0
        if conn.read:
            conn.read_ns = now
            self._take(conn)

    def _write(self, conn: _Conn, data: bytes) -> None:
        if conn.unsent:
            conn.unsent += data
            return
        try:
            done = conn.sock.send(data)
        except (BlockingIOError, InterruptedError):
            done = 0
        except OSError:
            self._drop(conn)
            return
        if done < len(data):
            self._keep(conn, data[done:])

    def _keep(self, conn: _Conn, data: bytes) -> None:
        conn.unsent += data
        self._poll.modify(conn.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _flush(self, conn: _Conn) -> None:
        try:
            done = conn.sock.send(conn.unsent)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._drop(conn)
            return
        del conn.unsent[:done]
        if not conn.unsent:
            self._poll.modify(conn.sock.fileno(), select.EPOLLIN)

    def _drop(self, conn: _Conn) -> None:
        if conn.open:
            conn.open = False
            self._conns.pop(conn.sock.fileno(), None)
            conn.sock.close()


def _whole(status: bytes, value: object) -> bytes:
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def many_files() -> None:
    """Let this process hold as many connections as the machine allows it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(argv: list[str]) -> int:
    """Serve; ``argv`` is [host,] port."""
    many_files()
    server = Truth(argv[0] if len(argv) > 1 else "127.0.0.1", int(argv[-1]))
    print(f"port {server.port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve(sys.stdin.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
