"""The client's hot path against a server that sends exactly the bytes it is told, cut where it is told."""

from __future__ import annotations

import contextlib
import gc
import itertools
import mmap
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httptools
import pytest
from certificates import certificate

from pdbench.run.exchange import Endpoint, Exchange
from pdbench.run.wire import Wire

EVENTS = 'data: {"text":"é🙂"}\n\ndata: [DONE]\n\n'.encode()
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(body: bytes, size: int = 7) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


STREAM = OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(EVENTS)


class Server:
    """Answers the n-th request of all with ``script(n, request)``: pieces to send (a number: seconds to wait), None: hang."""

    def __init__(
        self, script: Callable[[int, bytes], list[bytes | float] | None], keep: bool = True, tls: Path | None = None
    ) -> None:
        self.script, self.keep = script, keep
        self.requests: list[bytes] = []
        self.connections = 0
        self.lock = threading.Lock()
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=600)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.socket.getsockname()[1]}"
        self.context = None
        if tls:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(tls)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                made, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.serve, args=(made,), daemon=True).start()

    def serve(self, raw: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            made = stack.enter_context(raw if self.context is None else self.context.wrap_socket(raw, server_side=True))
            while request := self.request(made):
                with self.lock:
                    number = len(self.requests)
                    self.requests.append(request)
                pieces = self.script(number, request)
                if pieces is None:
                    time.sleep(30)
                for piece in pieces or []:
                    if isinstance(piece, bytes):
                        made.sendall(piece)
                    else:
                        time.sleep(piece)
                if not self.keep:
                    return

    @staticmethod
    def request(made: socket.socket) -> bytes:
        got = b""
        while b"\r\n\r\n" not in got:
            if not (part := made.recv(65536)):
                return b""
            got += part
        head, _, body = got.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        while len(body) < length:
            body += made.recv(65536)
        return head + b"\r\n\r\n" + body


@pytest.fixture
def served() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def serve(script: Callable[[int, bytes], list[bytes | float] | None], **more: object) -> Server:
        made.append(Server(script, **more))  # type: ignore[arg-type]
        return made[-1]

    yield serve
    for server in made:
        server.socket.close()


def exchanges(
    url: str, bodies: list[bytes], timeout_s: float = 10.0, ahead: int = 0, at_once: bool = False, ca: str = ""
) -> list[Exchange]:
    """Send bodies one after the other (or all at once) over one wire; return what came, in the order of the bodies."""
    done: list[Exchange] = []
    wire = Wire(Endpoint(url, "/v1/completions", {"Authorization": "Bearer k"}, timeout_s, ca), done.append)
    try:
        if ahead:
            wire.open_ahead(ahead)
        for number, body in enumerate(bodies):
            wire.post(Exchange(number, time.perf_counter()), body)
            while not at_once and len(done) <= number:
                wire.poll(0.2)
        while len(done) < len(bodies):
            wire.poll(0.2)
        assert wire.in_flight == 0
    finally:
        wire.close()
    return sorted(done, key=lambda exchange: exchange.index)


def body_of(exchange: Exchange) -> bytes:
    return b"".join(exchange.parts)


@pytest.mark.parametrize("step", [1, 3, 10_000])
def test_an_answer_is_whole_wherever_it_is_cut(served: Callable[..., Server], step: int) -> None:
    pieces: list[bytes | float] = []
    for at in range(0, len(STREAM), step):
        pieces += [STREAM[at : at + step], 0.001]
    (found,) = exchanges(served(lambda n, r: pieces).url, [b"{}"])
    assert (found.error, found.status, found.content_type) == ("", 200, "text/event-stream")
    assert body_of(found) == EVENTS
    assert sum(found.lengths) == len(EVENTS)
    assert list(found.stamps) == sorted(found.stamps)
    assert found.sent < found.stamps[0] <= found.ended


def test_the_request_is_what_http_asks_for(served: Callable[..., Server]) -> None:
    server = served(lambda n, r: [STREAM])
    exchanges(server.url, [b'{"a":1}'])
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v1/completions HTTP/1.1"
    assert {"Authorization: Bearer k", "Content-Length: 7", f"Host: {server.url.removeprefix('http://')}"} <= set(lines)
    assert body == b'{"a":1}'


def test_stamps_are_arrivals_however_late_they_are_read(served: Callable[..., Server]) -> None:
    """A client that sleeps for 0.5 s while the answer comes has its stamps right all the same: they are the kernel's."""
    came: list[float] = []

    def script(number: int, request: bytes) -> list[bytes | float]:
        came.append(time.perf_counter())
        return [0.1, STREAM]

    done: list[Exchange] = []
    wire = Wire(Endpoint(served(script).url, "/x", {}, 10.0), done.append)
    wire.post(Exchange(0, 0.0), b"{}")
    while not came:
        wire.poll(0.001)
    time.sleep(0.5)
    while not done:
        wire.poll(0.1)
    wire.close()
    assert wire.stamped >= 1
    assert done[0].stamps[0] - came[0] < 0.4
    assert max(wire.lags) >= 1000, "a delay of 0.4 s is not in the record, in steps of 0.1 ms"


def test_stamps_stay_in_order_though_the_clocks_are_compared_badly(
    served: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's clock is not the process's, and how far apart they are is read anew with every batch."""
    true, wrong = time.time, itertools.cycle([0.0, -0.02, 0.01, -0.005])
    monkeypatch.setattr("pdbench.run.wire.time.time", lambda: true() + next(wrong))
    pieces: list[bytes | float] = []
    for at in range(0, len(STREAM), 2):
        pieces += [STREAM[at : at + 2], 0.002]
    (found,) = exchanges(served(lambda n, r: [0.05, *pieces]).url, [b"{}"])
    assert body_of(found) == EVENTS
    assert len(found.stamps) > 5
    assert list(found.stamps) == sorted(found.stamps)
    assert found.sent < found.stamps[0] <= found.stamps[-1] <= found.ended


def test_a_prompt_larger_than_the_socket_takes(served: Callable[..., Server]) -> None:
    body = b"x" * 8_000_000  # more than 50,000 tokens, as ids
    server = served(lambda n, r: [STREAM])
    (found,) = exchanges(server.url, [body])
    assert found.error == ""
    assert server.requests[0].endswith(body)


def test_connections_are_used_again_and_opened_ahead(served: Callable[..., Server]) -> None:
    server = served(lambda n, r: [STREAM])
    assert [e.error for e in exchanges(server.url, [b"{}"] * 5)] == [""] * 5
    assert server.connections == 1
    server = served(lambda n, r: [0.2, STREAM])
    assert [e.error for e in exchanges(server.url, [b"{}"] * 100, ahead=100, at_once=True)] == [""] * 100
    assert server.connections == 100


def test_a_connection_that_the_server_closed_is_not_used(served: Callable[..., Server]) -> None:
    server = served(lambda n, r: [STREAM], keep=False)
    done: list[Exchange] = []
    wire = Wire(Endpoint(server.url, "/x", {}, 10.0), done.append)
    for number in range(3):
        wire.post(Exchange(number, 0.0), b"{}")
        deadline = time.monotonic() + 0.3
        while len(done) <= number or time.monotonic() < deadline:
            wire.poll(0.05)
    wire.close()
    assert [e.error for e in done] == [""] * 3
    assert server.connections == 3


@pytest.mark.parametrize(
    ("answer", "error", "status"),
    [
        ([OK + b"Content-Length: 5\r\n\r\nhel"], "truncated: the connection ended before the response did", 200),
        ([STREAM[:-5]], "truncated: the connection ended before the response did", 200),
        ([], "disconnected: the server closed the connection without an answer", 0),
        ([b"HTTP/1.1 200"], "truncated: the connection ended before the response did", 0),
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], "not HTTP: ", 0),
        ([OK + b"Connection: close\r\n\r\n" + EVENTS], "", 200),
        ([OK + b"Content-Length: %d\r\n\r\n" % len(EVENTS) + EVENTS], "", 200),
        ([b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + STREAM], "", 200),
        ([b"HTTP/1.1 503 No\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}"], "", 503),
        ([b"HTTP/1.1 204 Empty\r\n\r\n"], "", 204),
    ],
)
def test_every_end_of_an_answer(served: Callable[..., Server], answer: list[bytes | float], error: str, status: int) -> None:
    (found,) = exchanges(served(lambda n, r: answer, keep=False).url, [b"{}"])
    assert found.error.startswith(error) if error else found.error == ""
    assert found.status == status
    if not error and status == 200:
        assert body_of(found) == EVENTS


def test_a_hanging_server_costs_the_time_limit_and_no_other_request(served: Callable[..., Server]) -> None:
    server = served(lambda n, r: None if b"hang" in r else [STREAM])
    found = exchanges(server.url, [b"hang", b"{}", b"{}"], timeout_s=1.5, at_once=True)
    assert [e.error for e in found] == ["timeout: no complete answer after 1.5 s", "", ""]


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    found = exchanges(url, [b"{}"] * 3, at_once=True)
    assert {e.error for e in found} == {"not connected: Connection refused"}
    assert all(e.sent != e.sent for e in found), "what was never sent has a time of sending"


def test_nothing_is_left_of_what_failed(served: Callable[..., Server]) -> None:
    """Senders run without a collector, over a file of bodies that is mapped: both tell at once who holds what."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        refusing = f"http://127.0.0.1:{gone.getsockname()[1]}"
    closing = served(lambda n, r: [STREAM], keep=False).url
    gc.collect()
    gc.disable()
    try:
        for url in (refusing, closing):
            before = sum(isinstance(o, httptools.HttpResponseParser) for o in gc.get_objects())
            with mmap.mmap(-1, 4096) as bodies:
                view = memoryview(bodies)
                found = exchanges(url, [view[:100], view[100:200], view[200:300]], at_once=True)  # type: ignore[list-item]
                assert len(found) == 3
                view.release()
            assert sum(isinstance(o, httptools.HttpResponseParser) for o in gc.get_objects()) == before
    finally:
        gc.enable()


def test_a_reset_in_the_middle(served: Callable[..., Server]) -> None:
    def script(number: int, request: bytes) -> list[bytes | float]:
        return [STREAM[:-12], 0.05]

    server = served(script, keep=False)
    inside = server.serve

    def reset(raw: socket.socket) -> None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        inside(raw)

    server.serve = reset  # type: ignore[method-assign]
    (found,) = exchanges(server.url, [b"{}"])
    assert found.error == "reset: the connection broke: Connection reset by peer"
    assert found.status == 200
    assert EVENTS.startswith(body_of(found))


def test_tls(served: Callable[..., Server], tmp_path: Path) -> None:
    made, own = tmp_path / "pair.pem", certificate(tmp_path, "own")
    made.write_text(own.key.read_text() + own.cert.read_text())
    server = served(lambda n, r: [STREAM[:60], 0.01, STREAM[60:]], tls=made)
    (refused,) = exchanges(server.url, [b"{}"])
    assert refused.error.startswith("not connected: ")
    assert "certificate" in refused.error.lower()
    server.requests.clear()
    found = exchanges(server.url, [b"{}", b"y" * 3_000_000], ca=own.cert.read_text())
    assert [(e.error, body_of(e)) for e in found] == [("", EVENTS)] * 2
    assert server.connections == 2  # one refused, one used twice
