"""The meeting of a prefill and a decode worker, over one WebSocket a pair on the prefill's bootstrap port.

Real SGLang exchanges addresses there, talks over ZMQ and moves the KV cache with RDMA or TCP. Here the decode worker opens
`GET /emulated/kv` and both send JSON messages that name a room:

    decode -> prefill   {"ask": ROOM, "drop": false}, {"grant": ROOM} (it has memory), {"leave": ROOM}
    prefill -> decode   {"found": ROOM}, {"kv": ROOM, "tokens", "digest", "bytes", "transport", "cached", "unchecked"},
                        {"failed": ROOM, "why"}

The `kv` message carries a proof of the prompt instead of its KV cache: the decode worker checks it and makes its output from
it, so that wrong or missing KV can never look like success (but for a fault that a test asked for).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
from aiohttp import web
from yarl import URL

from pdbench.emulate.text import Prompt
from pdbench.reading import json_of

Json = dict[str, Any]
log = logging.getLogger("pdbench.emulate")
#: What SGLang 0.5.23 gives as the reason when one side gave a request up, whatever made it do so.
GIVEN_UP = "Aborted by AbortReq."


class HandshakeError(Exception):
    """A request that failed between prefill and decode; `bootstrap` tells before from during the transfer."""

    status = 500

    def __init__(self, message: str, *, bootstrap: bool) -> None:
        """Say what failed."""
        super().__init__(message)
        self.bootstrap = bootstrap


@dataclass(frozen=True)
class Timeouts:
    """SGLang's limits in seconds, from SGLang's environment variables."""

    bootstrap_s: float = 300.0
    waiting_s: float = 300.0
    heartbeat_s: float = 5.0
    heartbeat_failures: int = 2

    @classmethod
    def from_environment(cls) -> Timeouts:
        """Read the variables. Raises ValueError that names the one that is not a number above 0."""
        names = {
            "bootstrap_s": "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT",
            "waiting_s": "SGLANG_DISAGGREGATION_WAITING_TIMEOUT",
            "heartbeat_s": "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL",
            "heartbeat_failures": "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE",
        }
        values = {}
        for key, name in names.items():
            raw = os.environ.get(name)
            if raw is None:
                continue
            try:
                values[key] = float(raw)
            except ValueError:
                values[key] = 0.0
            if not 0 < values[key] < float("inf"):
                raise ValueError(f"{name} must be a number above 0, not {raw!r}")
        failures = int(values.pop("heartbeat_failures", cls.heartbeat_failures))
        return cls(**values, heartbeat_failures=max(1, failures))


@dataclass(frozen=True)
class Place:
    """Where a worker is, as far as the way of the KV cache depends on it: its address, host and RDMA fabric (`none`: no RDMA)."""

    address: str
    node: str
    fabric: str

    @classmethod
    def of(cls, query: Any) -> Place:
        """Read what a decode worker says of itself in the query of its WebSocket."""
        return cls(query.get("address", ""), query.get("node", ""), query.get("fabric", "none"))


def transport_between(backend: str, one: Place, other: Place) -> str:
    """Return how KV travels between two workers: what the transfer engine of SGLang would end up with there.

    NIXL takes NVLink inside a host; both engines take RDMA where both ends are on one fabric, and TCP elsewhere.
    """
    if backend == "mooncake_tcp":
        return "tcp"
    if backend == "nixl" and one.node == other.node:
        return "cuda_ipc"
    return "rdma" if one.fabric == other.fabric != "none" else "tcp"


@dataclass(frozen=True)
class Kv:
    """The proof that stands for a KV cache, and how it travelled.

    `cached_tokens` of the prompt came from the prefill's prefix cache; `unchecked`: a fault spoilt it on purpose.
    """

    prompt: Prompt
    size_bytes: int
    transport: str
    cached_tokens: int = 0
    unchecked: bool = False

    def to_json(self, room: int) -> Json:
        """Return the message."""
        return {
            "kv": room,
            "tokens": self.prompt.tokens,
            "digest": self.prompt.digest.hex(),
            "bytes": self.size_bytes,
            "transport": self.transport,
            "cached": self.cached_tokens,
            "unchecked": self.unchecked,
        }

    @classmethod
    def from_json(cls, data: Json) -> Kv:
        """Read the message. Raises ValueError."""
        try:
            prompt = Prompt(int(data["tokens"]), bytes.fromhex(data["digest"]))
            return cls(prompt, int(data["bytes"]), str(data["transport"]), int(data["cached"]), bool(data["unchecked"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"not a KV message: {data!r}") from None


class Sender(Protocol):
    """What a prefill engine is told about its rooms."""

    def on_asked(self, room: int, place: Place, drop: bool) -> None:
        """Hear that a decode worker is in the room; `drop`: it wants no KV."""

    def on_granted(self, room: int) -> None:
        """Hear that the decode worker has memory for the KV."""

    def on_left(self, room: int, gone: bool) -> None:
        """Hear that the decode worker gave the request up, or (`gone`) that its connection broke."""


class Rooms:
    """The prefill's side: who is in which room. One engine, many decode workers."""

    def __init__(self, sender: Sender, heartbeat_s: float) -> None:
        """Start without rooms."""
        self._sender, self._heartbeat_s = sender, heartbeat_s
        self._open: set[int] = set()
        self._decode: dict[int, tuple[web.WebSocketResponse, Place, bool]] = {}
        self._sockets: set[web.WebSocketResponse] = set()
        self._sending: set[asyncio.Future[None]] = set()

    def open(self, room: int) -> None:
        """Enter a room as prefill; `on_asked` follows at once when the decode worker is there."""
        self._open.add(room)
        if room in self._decode:
            self._met(room)

    def _met(self, room: int) -> None:
        socket, place, drop = self._decode[room]
        self._say(socket, {"found": room})
        self._sender.on_asked(room, place, drop)

    def close(self, room: int, message: Json | None) -> None:
        """Leave a room as prefill with a last message for the decode worker, if it is there."""
        self._open.discard(room)
        there = self._decode.pop(room, None)
        if there and message:
            self._say(there[0], message)

    def _say(self, socket: web.WebSocketResponse, message: Json) -> None:
        if socket.closed:
            return

        async def send() -> None:
            with contextlib.suppress(ConnectionError):  # its leaving is noted by whoever reads from it
                await socket.send_str(json.dumps(message))

        task = asyncio.ensure_future(send())
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Serve `GET /emulated/kv` to a decode worker, as long as it is connected."""
        socket = web.WebSocketResponse(timeout=0.3, compress=False, heartbeat=self._heartbeat_s)
        await socket.prepare(request)
        place = Place.of(request.query)
        self._sockets.add(socket)
        try:
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    try:
                        self._hear(socket, place, json_of(message.data))
                    except (ValueError, TypeError, KeyError):
                        await socket.close(code=aiohttp.WSCloseCode.UNSUPPORTED_DATA, message=b"not a message of pdbench emulate")
        finally:
            self._sockets.discard(socket)
            for room in [room for room, there in self._decode.items() if there[0] is socket]:
                self._leave(room, gone=True)
        return socket

    def _hear(self, socket: web.WebSocketResponse, place: Place, said: Json) -> None:
        if "ask" in said:
            room = int(said["ask"])
            if room in self._decode:
                self._say(socket, {"failed": room, "why": f"bootstrap room {room} already has a decode worker"})
                return
            self._decode[room] = (socket, place, bool(said.get("drop")))
            if room in self._open:
                self._met(room)
        elif "grant" in said and said["grant"] in self._decode:
            self._sender.on_granted(int(said["grant"]))
        elif "leave" in said and said["leave"] in self._decode:
            self._leave(int(said["leave"]), gone=False)

    def _leave(self, room: int, gone: bool) -> None:
        del self._decode[room]
        if room in self._open:
            self._sender.on_left(room, gone)

    async def shut(self) -> None:
        """Close all connections."""
        for socket in list(self._sockets):
            await socket.close()


def bootstrap_app(rooms: Rooms) -> web.Application:
    """Return the bootstrap server: as in SGLang it has a `/health` and asks for no key."""

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="OK")

    async def shut(_: web.Application) -> None:
        await rooms.shut()

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/emulated/kv", rooms.answer)])
    app.on_shutdown.append(shut)
    return app


class Receiver(Protocol):
    """What a decode engine is told about a request that it asked a prefill worker for."""

    def on_found(self) -> None:
        """Hear that the prefill worker knows the request, too."""

    def on_kv(self, kv: Kv) -> None:
        """Hear that the KV left the prefill worker."""

    def on_failed(self, problem: HandshakeError) -> None:
        """Hear that it will not come."""


class Link:
    """The decode's side of one pair: one prefill worker, all rooms that are asked of it."""

    def __init__(
        self, session: aiohttp.ClientSession, address: tuple[str, int], own: Place, timeouts: Timeouts, retry: tuple[int, float]
    ):
        """`retry`: how often, and how many seconds apart, a prefill that does not answer is asked."""
        self._session, (self._host, self._port), self._own = session, address, own
        self._timeouts, (self._attempts, self._interval_s) = timeouts, retry
        self._rooms: dict[int, Receiver] = {}
        self._outbox: asyncio.Queue[Json] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def ask(self, room: int, receiver: Receiver, drop: bool) -> None:
        """Enter a room; `receiver` hears what comes of it."""
        self._rooms[room] = receiver
        self._outbox.put_nowait({"ask": room, "drop": drop})
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._live())

    def grant(self, room: int) -> None:
        """Say that there is memory."""
        self._outbox.put_nowait({"grant": room})

    def leave(self, room: int) -> None:
        """Give a room up."""
        if self._rooms.pop(room, None):
            self._outbox.put_nowait({"leave": room})

    async def close(self) -> None:
        """Drop the connection: the prefill worker sees its decode leave."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def _url(self) -> URL:
        own = {"address": self._own.address, "node": self._own.node, "fabric": self._own.fabric}
        return URL.build(scheme="http", host=self._host, port=self._port, path="/emulated/kv", query=own)

    async def _live(self) -> None:
        refused, address = 0, f"{self._host}:{self._port}"
        beat = self._timeouts.heartbeat_s * self._timeouts.heartbeat_failures
        while self._rooms:
            try:
                closing = aiohttp.ClientWSTimeout(ws_close=0.2)
                async with self._session.ws_connect(self._url, timeout=closing, heartbeat=beat) as socket:
                    refused = 0
                    await self._talk(socket)
                lost = self._take_all()
                # One that is back in time is not missed: its old requests wait for their limit, as in SGLang.
                if lost and await self._dead():
                    message = f"Lost connection with prefill instance (bootstrap_addr: {address})"
                    log.error("%s, %d requests affected", message, len(lost))
                    self._fail(lost, HandshakeError(message, bootstrap=False))
            except (aiohttp.ClientConnectorError, TimeoutError):
                refused += 1
                if refused < self._attempts:
                    await asyncio.sleep(self._interval_s)
                    continue
                log.error("Could not fetch prefill parallel info from %s after %d attempts", address, refused)
                refused = 0
                self._fail(self._take_all(), HandshakeError(GIVEN_UP, bootstrap=True))
            except (aiohttp.ClientError, ValueError) as why:
                message = f"{address} is not an emulated prefill worker: {why}"
                self._fail(self._take_all(), HandshakeError(message, bootstrap=True))

    async def _talk(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async def write() -> None:
            while True:
                await socket.send_str(json.dumps(await self._outbox.get()))

        writer = asyncio.ensure_future(write())
        try:
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    self._hear(json_of(message.data))
        finally:
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError, aiohttp.ClientError):
                await writer

    def _hear(self, said: Json) -> None:
        if not isinstance(said, dict):
            raise ValueError(f"not a message: {said!r}")
        if "found" in said and said["found"] in self._rooms:
            self._rooms[said["found"]].on_found()
        elif "kv" in said and said["kv"] in self._rooms:
            kv = Kv.from_json(said)
            self._rooms.pop(said["kv"]).on_kv(kv)
        elif "failed" in said and said["failed"] in self._rooms:
            why = f"prefill {self._host}:{self._port} failed room {said['failed']}: {said['why']}"
            self._rooms.pop(said["failed"]).on_failed(HandshakeError(why, bootstrap=False))

    async def _dead(self) -> bool:
        """Whether a prefill whose connection broke misses as many heartbeats as SGLang waits for before it gives it up."""
        url = URL.build(scheme="http", host=self._host, port=self._port, path="/health")
        for _ in range(self._timeouts.heartbeat_failures):
            await asyncio.sleep(self._timeouts.heartbeat_s)
            try:
                async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=5)):
                    return False
            except (aiohttp.ClientError, TimeoutError):
                continue
        return True

    def _take_all(self) -> list[Receiver]:
        receivers, self._rooms, self._outbox = list(self._rooms.values()), {}, asyncio.Queue()
        return receivers

    @staticmethod
    def _fail(receivers: list[Receiver], problem: HandshakeError) -> None:
        for receiver in receivers:
            receiver.on_failed(problem)


class Links:
    """The decode's side: a link for every prefill worker that it was sent to."""

    def __init__(self, own: Place, timeouts: Timeouts, attempts: int, interval_s: float) -> None:
        """Needs a running loop."""
        self._own, self._timeouts, self._retry = own, timeouts, (attempts, interval_s)
        self._links: dict[tuple[str, int], Link] = {}
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=5), trust_env=False)

    def to(self, host: str, port: int) -> Link:
        """Return the link to a prefill worker; nothing is connected before something is asked."""
        if (host, port) not in self._links:
            self._links[host, port] = Link(self._session, (host, port), self._own, self._timeouts, self._retry)
        return self._links[host, port]

    async def close(self) -> None:
        """Close all connections: prefill workers see their decode leave."""
        for link in self._links.values():
            await link.close()
        await self._session.close()
