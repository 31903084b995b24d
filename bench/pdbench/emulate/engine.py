"""The emulated engine: takes each prompt through queue, prefill, KV transfer and decode, in real time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

from pdbench.emulate.asks import BadAskError, Item
from pdbench.emulate.handshake import HandshakeError, Kv, KvClient, Room, Rooms, Timeouts
from pdbench.emulate.metrics import Gauge, WorkerMetrics
from pdbench.emulate.model import PerfModel, PrefillLine
from pdbench.emulate.profile import Profile

Role = Literal["prefill", "decode", "aggregated"]
#: What SGLang calls the roles: in `disaggregation_mode`, and in the label `engine_type`.
MODES: dict[Role, str] = {"prefill": "prefill", "decode": "decode", "aggregated": "null"}
ENGINE_TYPES: dict[Role, str] = {"prefill": "prefill", "decode": "decode", "aggregated": "unified"}
#: The output of a worker whose transfer is a fake (warm-up): made of no prompt at all, as it is there.
NO_KV = bytes(32)


@dataclass(frozen=True)
class WorkerConfig:
    """What one worker was started with. Ports are TCP ports, `context_length` is in tokens."""

    role: Role
    host: str
    port: int
    bootstrap_port: int
    profile: Profile
    transport: str
    model_path: str
    served_model_name: str
    tp_size: int
    max_running_requests: int
    context_length: int
    timeouts: Timeouts
    api_key: str | None = field(default=None, repr=False)


# uvloop's own clock stands still within a turn of the loop and counts whole milliseconds; its timers, too, are of
# whole milliseconds, counted from that clock. Hence this clock, and sleeps that look at it again when they end.
now = time.monotonic
GRAIN_S = 0.0005


async def sleep_until(due: float, end: asyncio.Future[None] | None = None) -> None:
    """Sleep until `due` on the clock of `now`, half a millisecond early at most; less when `end` is done."""
    while (delay := due - now()) > GRAIN_S and not (end and end.done()):
        if end is None:
            await asyncio.sleep(delay)
        else:
            await asyncio.wait([end], timeout=delay)


class Running:
    """One item that has its first token: what the server needs to send every token when it is due."""

    def __init__(self, engine: Engine, digest: bytes, tokens: int, first_due: float) -> None:
        """Take the digest that the KV cache carried, the number of output tokens and the first token's due time."""
        self.digest, self.tokens = digest, tokens
        self._engine, self._first_due = engine, first_due
        self.sent = 0
        self.first_at = self.last_at = 0.0

    async def until_due(self) -> None:
        """Sleep until the next token is due."""
        await sleep_until(self._engine.model.token_due(self._first_due, self.sent))

    def count(self) -> None:
        """Note that the next token is there."""
        moment = now()
        if self.sent == 0:
            self.first_at = moment
        else:
            self._engine.metrics.itl.observe(moment - self.last_at)
        self.last_at = moment
        self.sent += 1

    async def rest(self) -> None:
        """Let all tokens that are left pass in their time: for a reply that is not streamed."""
        while self.sent < self.tokens:
            await self.until_due()
            self.count()


class Engine:
    """One worker. Make it in a running event loop."""

    def __init__(self, config: WorkerConfig) -> None:
        """Start idle."""
        self.config = config
        self.model = PerfModel(config.profile, config.transport)
        self.metrics = WorkerMetrics(config.served_model_name, ENGINE_TYPES[config.role])
        self.rooms = Rooms()
        self.last_kv_latency_ms = self.last_kv_speed_gb_s = 0.0
        self.tokens_held = 0
        self.requests = 0
        self._kv = KvClient(config.timeouts, config.profile.bootstrap_attempts, config.profile.bootstrap_interval_s)
        self._line = PrefillLine(self.model)
        self._line_turn = asyncio.Lock()
        self._slots = asyncio.Semaphore(config.max_running_requests)
        for gauge in vars(self.metrics).values():
            if isinstance(gauge, Gauge):
                gauge.set(0)

    async def close(self) -> None:
        """Drop the connections to prefill workers."""
        await self._kv.close()

    def check(self, item: Item) -> None:
        """Refuse what a worker of this role cannot serve. Raises BadAskError."""
        if self.config.role == "aggregated" or item.fake_transfer:
            return
        if item.bootstrap_room is None:
            raise BadAskError("Invalid request: Disaggregated request received without bootstrap room id.")
        if self.config.role == "decode" and item.bootstrap_host is None:
            raise BadAskError("Invalid request: Disaggregated request received without bootstrap host.")

    @asynccontextmanager
    async def request(self, item: Item, stream: bool) -> AsyncIterator[Running]:
        """Give the item as soon as its first token is being made; keep SGLang's books when it ends, however it ends.

        Raises HandshakeError when prefill and decode do not come together.
        """
        own = "true" if stream else "false"
        arrival = now()
        tokens = 1 if self.config.role == "prefill" else item.output_tokens
        held = item.prompt.tokens
        self.requests += 1
        self.tokens_held += held
        running: Running | None = None
        try:
            async with self._ready(item) as (digest, first_due):
                running = Running(self, digest, tokens, first_due)
                yield running
        except (asyncio.CancelledError, ConnectionError):
            self.metrics.aborted.inc()
            raise
        finally:
            self.requests -= 1
            self.tokens_held -= held
            self._book(item, running, own, arrival)

    def _book(self, item: Item, running: Running | None, own: str, arrival: float) -> None:
        sent = running.sent if running else 0
        metrics = self.metrics
        metrics.requests.inc(1, own)
        metrics.prompt_tokens.inc(item.prompt.tokens, own)
        metrics.generation_tokens.inc(sent, own)
        metrics.e2e.observe(now() - arrival, own)
        if running and sent and self.config.role != "prefill":  # as in SGLang: a prefill worker has neither
            metrics.ttft.observe(running.first_at - arrival, own)
            if sent == running.tokens > 1:
                metrics.tpot.observe((running.last_at - running.first_at) / (sent - 1), own)

    @contextmanager
    def _in(self, gauge: Gauge) -> Iterator[None]:
        gauge.inc()
        try:
            yield
        finally:
            gauge.inc(-1)

    @asynccontextmanager
    async def _ready(self, item: Item) -> AsyncIterator[tuple[bytes, float]]:
        """Give the digest to generate from and the due time of the first token."""
        if self.config.role == "prefill":
            yield await self._prefill_role(item)
            return
        with self._in(self.metrics.queue):
            await self._slots.acquire()
        try:
            if self.config.role == "aggregated":
                digest, first_due = item.prompt.digest, await self._compute(item, None)
            else:
                digest = NO_KV if item.fake_transfer else await self._receive(item)
                first_due = now()
            with self._in(self.metrics.running):
                yield digest, first_due
        finally:
            self._slots.release()

    async def _compute(self, item: Item, room: Room | None) -> float:
        """Wait for the prefill line, then run the prompt; return when it was due to end."""
        arrival = now()
        with self._in(self.metrics.queue):
            await self._line_turn.acquire()
        try:
            end = self._line.begin(arrival, item.prompt.tokens)
            with self._in(self.metrics.running):
                await self._until(end, room)
        except BaseException:
            self._line.abort(now())
            raise
        finally:
            self._line_turn.release()
        return end

    async def _until(self, due: float, room: Room | None) -> None:
        """Sleep until `due`, less when the decode worker leaves the room. Raises HandshakeError then."""
        await sleep_until(due, room.decode_left if room else None)
        if room and room.decode_left.done():
            raise HandshakeError("Prefill transfer failed: the decode worker left", bootstrap=False)

    async def _prefill_role(self, item: Item) -> tuple[bytes, float]:
        """Meet the decode worker, compute, hand the KV over; the first token is due when it is there."""
        number = item.bootstrap_room
        if number is None or item.fake_transfer:
            return item.prompt.digest, await self._compute(item, None)
        with self._failures_counted():
            room = self.rooms.open(number)
            why = "the prefill worker dropped the request"
            try:
                entered = now()
                with self._in(self.metrics.bootstrap_queue):
                    await sleep_until(entered + self.config.timeouts.bootstrap_s, room.decode_came)
                if not room.decode_came.done():
                    limit = self.config.timeouts.bootstrap_s
                    raise HandshakeError(
                        f"Prefill bootstrap failed: no decode worker came to room {number} in {limit:g} s",
                        bootstrap=True,
                    )
                self.metrics.kv_bootstrap.observe((now() - entered) * 1e3)
                computed = await self._compute(item, room)
                size = self.model.kv_bytes(item.prompt.tokens)
                done = computed + self.model.transfer_s(size)
                with self._in(self.metrics.inflight_queue):
                    await self._until(done, room)
                self._note_transfer(size, done - computed)
                room.kv.set_result(Kv(item.prompt, size))
                return item.prompt.digest, done
            except HandshakeError as failure:
                why = str(failure)
                raise
            finally:
                self.rooms.close(number, why)

    def _note_transfer(self, size: int, seconds: float) -> None:
        self.last_kv_latency_ms = seconds * 1e3
        self.last_kv_speed_gb_s = size / 2**30 / seconds
        self.metrics.kv_latency.observe(self.last_kv_latency_ms)
        self.metrics.kv_total_mb.observe(size / 2**20)
        self.metrics.kv_speed.observe(self.last_kv_speed_gb_s)

    async def _receive(self, item: Item) -> bytes:
        """Fetch the KV of this prompt from its prefill worker; return the digest in it. Raises HandshakeError."""
        assert item.bootstrap_host is not None
        assert item.bootstrap_room is not None
        entered = now()
        queues = [self.metrics.prealloc_queue, self.metrics.transfer_queue]
        stage = 0

        def found() -> None:
            nonlocal stage
            if stage == 0:
                queues[0].inc(-1)
                queues[1].inc()
                stage = 1
                self.metrics.kv_bootstrap.observe((now() - entered) * 1e3)

        queues[0].inc()
        try:
            with self._failures_counted():
                port = self.config.bootstrap_port if item.bootstrap_port is None else item.bootstrap_port
                kv = await self._kv.fetch(item.bootstrap_host, port, item.bootstrap_room, found)
                wanted = Kv(item.prompt, self.model.kv_bytes(item.prompt.tokens))
                if kv != wanted:
                    raise HandshakeError(
                        f"the KV of room {item.bootstrap_room} is not that of this prompt: it is of {kv.prompt.tokens} "
                        f"tokens in {kv.size_bytes} bytes, not {wanted.prompt.tokens} in {wanted.size_bytes}, "
                        f"or of other tokens",
                        bootstrap=False,
                    )
                return kv.prompt.digest
        finally:
            queues[stage].inc(-1)

    @contextmanager
    def _failures_counted(self) -> Iterator[None]:
        try:
            yield
        except HandshakeError as failure:
            (self.metrics.bootstrap_failed if failure.bootstrap else self.metrics.transfer_failed).inc()
            raise
