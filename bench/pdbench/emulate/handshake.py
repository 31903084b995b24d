"""The meeting of a prefill and a decode worker, over HTTP on the prefill's bootstrap port.

Real SGLang exchanges addresses there and moves the KV cache with RDMA or TCP. Here the decode worker asks
`GET /emulated/kv?room=N`: the headers come when the prefill worker is in the room too, the body when prefill and
transfer are done. It carries a proof of the prompt instead of its KV cache: the decode worker checks it and makes its
output from it, so that wrong or missing KV can never look like success.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from yarl import URL

from pdbench.emulate.text import Prompt


class HandshakeError(Exception):
    """A request that failed between prefill and decode; `bootstrap` tells before from during the transfer."""

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
class Kv:
    """The proof that stands for a KV cache."""

    prompt: Prompt
    size_bytes: int

    def to_json(self) -> dict[str, object]:
        """Return the message."""
        return {"tokens": self.prompt.tokens, "digest": self.prompt.digest.hex(), "bytes": self.size_bytes}

    @classmethod
    def from_json(cls, data: object) -> Kv:
        """Read the message. Raises ValueError."""
        fields = data if isinstance(data, dict) else {}
        try:
            return cls(Prompt(int(fields["tokens"]), bytes.fromhex(fields["digest"])), int(fields["bytes"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"not a KV message: {data!r}") from None


class Room:
    """Where one request's prefill and decode meet."""

    def __init__(self) -> None:
        """Start empty."""
        loop = asyncio.get_running_loop()
        self.prefill_came: asyncio.Future[None] = loop.create_future()
        self.decode_came: asyncio.Future[None] = loop.create_future()
        self.decode_left: asyncio.Future[None] = loop.create_future()
        self.kv: asyncio.Future[Kv | str] = loop.create_future()  # text: why there will be none


class Rooms:
    """The bootstrap server's memory."""

    def __init__(self) -> None:
        """Start without rooms."""
        self._rooms: dict[int, Room] = {}

    def open(self, number: int) -> Room:
        """Enter a room as prefill. Raises HandshakeError when it is in use."""
        room = self._rooms.setdefault(number, Room())
        if room.prefill_came.done():
            raise HandshakeError(f"bootstrap room {number} is already in use", bootstrap=True)
        room.prefill_came.set_result(None)
        return room

    def close(self, number: int, why: str) -> None:
        """Leave a room as prefill; a decode worker that still waits there is told why."""
        room = self._rooms.pop(number)
        if not room.kv.done():
            room.kv.set_result(why)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Serve `GET /emulated/kv?room=N` to the decode worker."""
        try:
            number = int(request.query["room"])
        except (KeyError, ValueError):
            return web.json_response({"error": "room must be a whole number"}, status=400)
        room = self._rooms.setdefault(number, Room())
        if room.decode_came.done():
            return web.json_response({"error": f"bootstrap room {number} already has a decode worker"}, status=409)
        room.decode_came.set_result(None)
        try:
            # shield: the worker that leaves must not take the other one's futures with it
            await asyncio.shield(room.prefill_came)
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            result = await asyncio.shield(room.kv)
        finally:
            if not room.kv.done():
                room.decode_left.set_result(None)
                if not room.prefill_came.done():
                    del self._rooms[number]
        await response.write(json.dumps({"error": result} if isinstance(result, str) else result.to_json()).encode())
        return response


def bootstrap_app(rooms: Rooms) -> web.Application:
    """Return the bootstrap server: as in SGLang it has a `/health` and asks for no key."""

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="OK")

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/emulated/kv", rooms.answer)])
    return app


class KvClient:
    """The decode worker's side."""

    def __init__(self, timeouts: Timeouts, attempts: int, interval_s: float) -> None:
        """Give how often, and how many seconds apart, a prefill that does not answer is asked. Needs a running loop."""
        self._timeouts, self._attempts, self._interval_s = timeouts, attempts, interval_s
        # Every waiting request holds one connection; the default of 100 would make a queue that no engine has.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def close(self) -> None:
        """Close all connections: prefill workers see their decode leave."""
        await self._session.close()

    async def fetch(self, host: str, port: int, room: int, on_found: Callable[[], None]) -> Kv:
        """Return the KV of a room; `on_found` is called when the prefill is there too. Raises HandshakeError."""
        address = f"{host}:{port}"
        refused = 0
        while True:
            try:
                return await self._poll(host, port, room, on_found)
            except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                refused += 1
                if refused >= self._attempts:
                    raise HandshakeError(
                        f"Could not fetch prefill parallel info from {address} after {refused} attempts", bootstrap=True
                    ) from None
                await asyncio.sleep(self._interval_s)
            except TimeoutError:
                raise HandshakeError(
                    f"KV of room {room} did not come from {address} within {self._timeouts.waiting_s:g} s",
                    bootstrap=False,
                ) from None
            except aiohttp.ClientError:
                await self._survive(host, port)
            except ValueError as problem:
                raise HandshakeError(f"{address} is not an emulated prefill worker: {problem}", bootstrap=True) from None

    async def _poll(self, host: str, port: int, room: int, on_found: Callable[[], None]) -> Kv:
        url = URL.build(scheme="http", host=host, port=port, path="/emulated/kv", query={"room": str(room)})
        limit = aiohttp.ClientTimeout(total=self._timeouts.waiting_s, sock_connect=5)
        async with self._session.get(url, timeout=limit) as response:
            if response.status == 200:
                on_found()
            data = json.loads(await response.read())
        if isinstance(data, dict) and "error" in data:
            raise HandshakeError(f"prefill {host}:{port} failed room {room}: {data['error']}", bootstrap=False)
        return Kv.from_json(data)

    async def _survive(self, host: str, port: int) -> None:
        """Ask a prefill whose connection broke for its health, as SGLang's heartbeat does. Raises HandshakeError."""
        url = URL.build(scheme="http", host=host, port=port, path="/health")
        for _ in range(self._timeouts.heartbeat_failures):
            await asyncio.sleep(self._timeouts.heartbeat_s)
            try:
                async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=5)):
                    return
            except (aiohttp.ClientError, TimeoutError):
                continue
        raise HandshakeError(f"Losing connection with prefill instance (bootstrap_addr: {host}:{port})", bootstrap=False)
