"""The emulated engine: the scheduler of `pdbench.model` against the wall clock, and what it has to tell other workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from pdbench.emulate.asks import BadAskError, Item
from pdbench.emulate.config import ENGINE_TYPES, Role, WorkerConfig
from pdbench.emulate.faults import Faults
from pdbench.emulate.handshake import GIVEN_UP, HandshakeError, Kv, Links, Place, Rooms, transport_between
from pdbench.emulate.job import AbortedError, Job, Sink, now
from pdbench.emulate.metrics import WorkerMetrics
from pdbench.emulate.text import Prompt
from pdbench.model.rates import Rates
from pdbench.model.requests import FOREVER, Event, Limits, Request, Step, Token, Way
from pdbench.model.scheduler import Worker

#: Tokens that leave before the loop looks at its sockets again, so that a worker that is behind still answers.
MOST_AT_ONCE = 256
log = logging.getLogger("pdbench.emulate")


class Engine:
    """One worker. Make it in a running event loop."""

    def __init__(self, config: WorkerConfig) -> None:
        """Start idle."""
        self.config, self.role = config, config.role
        self.faults = Faults()
        self.metrics = WorkerMetrics(config.served_model_name, ENGINE_TYPES[config.role])
        self.rates = Rates(config.profile, config.tp_size)
        self.worker = Worker(self.rates, self._limits())
        self.worker.on_stage = self.metrics.note_stage
        self.worker.links.factor = self.faults.link_factor
        self.worker.on_step = self._note_step
        self.place = Place(f"{config.host}:{config.port}", config.node, config.rdma_fabric)
        self.rooms = Rooms(self, config.timeouts.heartbeat_s * config.timeouts.heartbeat_failures)
        figures = config.profile.engine
        self._links = Links(self.place, config.timeouts, figures.bootstrap_attempts, figures.bootstrap_interval_s)
        self.on_step: Callable[[Step], None] | None = None
        self.transports_seen: dict[str, str] = {}
        self.last_kv_latency_ms = self.last_kv_speed_gb_s = 0.0
        self.slow_down_s: float | None = None
        self._jobs: dict[int, Job] = {}
        self._in_room: dict[int, Job] = {}
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._timer_at = FOREVER
        self._hits = (0, 0)

    def _limits(self) -> Limits:
        config = self.config
        return Limits(
            capacity=config.max_total_tokens,
            max_running=config.max_running_requests,
            chunk=config.chunked_prefill_size,
            reserved=config.num_reserved_decode_tokens,
            # as in SGLang: a decode worker has no prefix cache unless it is asked to
            prefix_cache=not config.disable_radix_cache and self.role != "decode",
        )

    async def close(self) -> None:
        """Drop the connections to prefill workers."""
        if self._timer:
            self._timer.cancel()
        await self._links.close()

    # ---- what the server calls

    def check(self, item: Item) -> None:
        """Refuse what a worker of this role cannot serve. Raises BadAskError."""
        need, have = item.prompt.tokens + (0 if self.role == "prefill" else item.output_tokens), self.config.max_total_tokens
        if need > have:
            raise BadAskError(f"the request needs {need} tokens of KV cache and the worker has {have} (--max-total-tokens)")
        if self.role == "aggregated" or item.fake_transfer:
            return
        if item.bootstrap_room is None:
            raise BadAskError("Invalid request: Disaggregated request received without bootstrap room id.")
        if self.role == "decode" and item.bootstrap_host is None:
            raise BadAskError("Invalid request: Disaggregated request received without bootstrap host.")

    def start(self, item: Item, stream: bool, sink: Sink | None) -> Job:
        """Take an item that was checked; `sink` gets its tokens when they are due (None: nobody, only `done` counts)."""
        job = Job(self, item, stream, sink)
        self._jobs[id(job)] = job
        job.done.add_done_callback(lambda _: self._book(job))
        room = item.bootstrap_room
        if self.role == "aggregated" or item.fake_transfer or room is None:
            self._submit(job, "local")
        elif self.role == "prefill":
            self._start_prefill(job, room)
        else:
            self._start_decode(job, room)
        return job

    def abort(self, job: Job) -> None:
        """Stop a job: its client left, or asked for it."""
        if not job.done.done():
            self.metrics.aborted.inc()
            if job.request and job.request.way in ("send", "receive") and not job.moved:
                # as SGLang does: who gives up before the KV cache has moved is counted and logged as a failure
                before = not (job.granted_at if self.role == "prefill" else job.found_at)
                log.error("%s", self._failed(job, HandshakeError(GIVEN_UP, bootstrap=before)))
            self._end(job, AbortedError("the request was aborted"), "the request was aborted")

    def jobs(self) -> list[Job]:
        """Return all that are not done."""
        return list(self._jobs.values())

    @property
    def requests(self) -> int:
        """Return how many jobs are not done."""
        return len(self._jobs)

    @property
    def tokens_held(self) -> int:
        """Return the prompt tokens of all jobs that are not done, as routers weigh a worker by."""
        return sum(job.item.prompt.tokens for job in self._jobs.values())

    @property
    def kv_used_tokens(self) -> int:
        """Return the tokens of KV cache that running requests hold."""
        return self.worker.used

    @property
    def kv_capacity_tokens(self) -> int:
        """Return the tokens of KV cache that there are."""
        return self.config.max_total_tokens

    @property
    def retracted(self) -> int:
        """Return how many requests wait for memory that they had before."""
        return self.worker.states["retracted"]

    def flush_cache(self) -> int:
        """Drop the prefix cache; return the tokens."""
        return self.worker.flush()

    def slow_down(self, seconds: float | None) -> None:
        """Sleep so long before every forward pass (None: no more)."""
        self.slow_down_s, self.worker.slow_down_s = seconds, seconds or 0.0

    def switch_role(self, role: Role) -> None:
        """Go on as another role. Raises ValueError when requests are here."""
        if self._jobs:
            raise ValueError(f"{len(self._jobs)} requests are running")
        self.flush_cache()
        self.role = role
        self.worker.change(self._limits())
        self.metrics.relabel(ENGINE_TYPES[role])

    def refresh(self) -> None:
        """Bring the gauges up to date, before they are shown."""
        states, metrics, worker = self.worker.states, self.metrics, self.worker
        metrics.running.set(states["running"] + states["prefill"])
        metrics.queue.set(states["waiting"] + states["ready"] + states["frontend"])
        metrics.bootstrap_queue.set(states["bootstrap"])
        metrics.inflight_queue.set(states["sending"])
        metrics.prealloc_queue.set(states["prealloc"])
        metrics.transfer_queue.set(states["transfer"])
        metrics.retracted.set(states["retracted"])
        if worker.retracted:
            metrics.retracted_total.values[""] = worker.retracted
        metrics.num_used_tokens.set(worker.used)
        metrics.max_total_num_tokens.set(self.kv_capacity_tokens)
        metrics.token_usage.set(worker.used / self.kv_capacity_tokens)
        metrics.pending_prealloc_token_usage.set(worker.pending_tokens / self.kv_capacity_tokens)

    # ---- prefill

    def _start_prefill(self, job: Job, room: int) -> None:
        if room in self._in_room:
            self.fail(job, HandshakeError(f"bootstrap room {room} is already in use", bootstrap=True))
            return
        self._in_room[room] = job
        self._submit(job, "send")
        limit = self.config.timeouts.bootstrap_s
        late = HandshakeError(f"Request {room} timed out after {limit:.1f}s in KVPoll.Bootstrapping", bootstrap=True)
        job.timer = asyncio.get_running_loop().call_later(limit, self.fail, job, late)
        self.rooms.open(room)

    def on_asked(self, room: int, place: Place, drop: bool) -> None:
        """Hear that a decode worker is in the room."""
        job = self._in_room[room]
        assert job.request is not None
        job.request.peer, job.request.transport = place.address, self._transport(place)
        if drop:
            job.request.way = "local"
            self._grant(job)

    def _transport(self, other: Place) -> str:
        return transport_between(self.config.transfer_backend, self.place, other)

    def on_granted(self, room: int) -> None:
        """Hear that the decode worker has memory for the KV."""
        if job := self._in_room.get(room):
            self._grant(job)

    def _grant(self, job: Job) -> None:
        assert job.request is not None
        if job.timer:
            job.timer.cancel()
        job.granted_at = now()
        self.metrics.kv_bootstrap.observe((job.granted_at - job.arrived) * 1e3)
        self.worker.grant(job.granted_at, job.request)
        self._arm()

    def on_left(self, room: int, gone: bool) -> None:
        """Hear that the decode worker gave the request up; one that is gone is missed by a transfer, and by nothing before it."""
        if (job := self._in_room.get(room)) and (job.granted_at or not gone):
            assert job.request is not None
            dead = f"Decode instance could be dead, remote session {job.request.peer} is not alive"
            self.fail(job, HandshakeError(dead if gone else GIVEN_UP, bootstrap=not job.granted_at))

    def _note_sent(self, job: Job) -> None:
        """The last KV of a prompt has left."""
        assert job.request is not None
        room, size = job.item.bootstrap_room, job.request.sent_bytes
        assert room is not None
        peer, transport = job.request.peer, job.request.transport
        if self.faults.fails(peer):
            self.fail(job, HandshakeError(f"KV transfer to {peer} failed (injected)", bootstrap=False))
            return
        self._note_kv(peer, transport, size)
        spoilt = self.faults.corrupts()
        prompt = Prompt(job.item.prompt.tokens, job.item.prompt.digest[::-1]) if spoilt else job.item.prompt
        job.moved = True
        self._in_room.pop(room, None)
        self.rooms.close(room, Kv(prompt, size, transport, job.cached_tokens, spoilt).to_json(room))

    def _note_answered(self, job: Job, event: Event) -> None:
        """The prefill worker found out that the KV has left: what SGLang counts as the transfer ends here."""
        assert job.request is not None
        size, seconds = job.request.sent_bytes, event.took
        self.last_kv_latency_ms, self.last_kv_speed_gb_s = seconds * 1e3, size / 2**30 / seconds
        self.metrics.kv_latency.observe(self.last_kv_latency_ms)
        self.metrics.kv_speed.observe(self.last_kv_speed_gb_s)
        self.metrics.kv_total_mb.observe(size / 2**20)
        self.metrics.stage.observe(seconds, "prefill_transfer_kv_cache")

    def _note_kv(self, peer: str, transport: str, size: int) -> None:
        self.transports_seen[peer] = transport
        self.metrics.kv_transfers.inc(1, (peer, transport))
        self.metrics.kv_bytes.inc(size, (peer, transport))

    # ---- decode

    def _start_decode(self, job: Job, room: int) -> None:
        item = job.item
        assert item.bootstrap_host is not None
        port = self.config.bootstrap_port if item.bootstrap_port is None else item.bootstrap_port
        job.link = self._links.to(item.bootstrap_host, port)
        recompute = self.faults.recompute
        self._submit(job, "local" if recompute else "receive")
        assert job.request is not None
        job.request.peer = f"{item.bootstrap_host}:{port}"
        if not recompute:
            limit = self.config.timeouts.waiting_s
            late = HandshakeError(f"Request {room} timed out after {limit:.1f}s in KVPoll.WaitingForInput", bootstrap=False)
            job.timer = asyncio.get_running_loop().call_later(limit, self.fail, job, late)
        job.link.ask(room, job, recompute)

    def found(self, job: Job) -> None:
        """Hear that the prefill worker knows the request, too."""
        if job.request and not job.done.done():
            job.found_at = now()
            self.metrics.kv_bootstrap.observe((job.found_at - job.arrived) * 1e3)
            self.worker.found(job.found_at, job.request)
            self._arm()

    def kv_came(self, job: Job, kv: Kv) -> None:
        """Hear that the KV left the prefill worker; the own link has to take it yet."""
        request = job.request
        if request is None or job.done.done():
            return
        wanted = Kv(job.item.prompt, self.rates.kv_bytes(job.item.prompt.tokens), kv.transport, kv.cached_tokens)
        if not kv.unchecked and kv != wanted:
            why = (
                f"the KV of room {job.item.bootstrap_room} is not that of this prompt: it is of {kv.prompt.tokens} tokens in "
                f"{kv.size_bytes} bytes, not {wanted.prompt.tokens} in {wanted.size_bytes}, or of other tokens"
            )
            return self.fail(job, HandshakeError(why, bootstrap=False))
        if self.faults.fails(request.peer):
            why = f"KV transfer from {request.peer} failed (injected)"
            return self.fail(job, HandshakeError(why, bootstrap=False))
        job.moved = True
        job.digest = kv.prompt.digest[::-1] if self.faults.corrupts() else kv.prompt.digest
        if job.timer:
            job.timer.cancel()
        request.transport, request.cached = kv.transport, kv.cached_tokens
        self._note_kv(request.peer, kv.transport, kv.size_bytes)
        self.worker.deliver(now(), request, kv.size_bytes)
        return self._arm()

    # ---- the clock

    def _submit(self, job: Job, way: Way) -> None:
        prompt = job.item.prompt
        job.request = Request(way, prompt.tokens, job.tokens, prompt.packed, tag=job)
        self.worker.submit(job.arrived, job.request)
        self._arm()

    def _arm(self) -> None:
        """Wake up when the worker has something to do."""
        at = self.worker.next_at
        if at == self._timer_at and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = at
        if at == FOREVER:
            return
        loop, delay = asyncio.get_running_loop(), at - now()
        # uvloop's timers are of whole milliseconds; what is due within the same one leaves together.
        self._timer = loop.call_later(max(delay, 0.001), self._tick) if delay > 0 else loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, FOREVER
        moment = now()
        for event in self.worker.advance(moment):
            job = event.request.tag
            if not isinstance(job, Job) or job.done.done():
                continue
            if event.kind == "sent":
                self._note_sent(job)
            elif event.kind == "answered":
                self._note_answered(job, event)
            else:
                job.granted_at = now()
                self.metrics.kv_alloc.observe((job.granted_at - job.found_at) * 1e3)
                assert job.link is not None
                assert job.item.bootstrap_room is not None
                job.link.grant(job.item.bootstrap_room)
        self._hand_over(self.worker.tokens(moment, MOST_AT_ONCE))
        self._arm()

    def _hand_over(self, tokens: list[Token]) -> None:
        late, itl = self.metrics.lateness.observe, self.metrics.itl.observe
        for due, request, number in tokens:
            job: Job | None = request.tag  # type: ignore[assignment]
            if job is None or job.over:
                continue
            last = number == job.tokens - 1
            if job.sink is not None:
                job.sink.token(job, number, last)
            moment = now()
            late(moment - due)
            if number:
                itl(moment - job.last_at)
            else:
                job.first_at = moment
            job.sent, job.last_at = number + 1, moment
            if last:
                job.over = True
                job.done.set_result(None)

    def _note_step(self, step: Step) -> None:
        self.metrics.realtime.inc(step.tokens, "decode" if step.kind == "decode" else "prefill_compute")
        if step.kind == "decode":
            self.metrics.gen_throughput.step(step.tokens)
        else:
            hit, asked = self.worker.hit_tokens - self._hits[0], self.worker.asked_tokens - self._hits[1]
            self._hits = (self.worker.hit_tokens, self.worker.asked_tokens)
            self.metrics.cache_hit_rate.set(hit / asked if asked else 0.0)
        if self.on_step:
            self.on_step(step)

    # ---- ends

    def fail(self, job: Job, problem: HandshakeError) -> None:
        """End a job whose prefill and decode did not come together."""
        if not job.done.done():
            self._end(job, self._failed(job, problem), str(problem))

    def _failed(self, job: Job, problem: HandshakeError) -> HandshakeError:
        """Count a failure between prefill and decode; return it in SGLang 0.5.23's words: doctor.yml looks for them."""
        (self.metrics.bootstrap_failed if problem.bootstrap else self.metrics.transfer_failed).inc()
        stage = "transfer" if not problem.bootstrap else "handshake" if self.role == "decode" else "bootstrap"
        side, name, room = self.role.capitalize(), "decode_req.req" if self.role == "decode" else "req", job.item.bootstrap_room
        return HandshakeError(
            f"{side} {stage} failed for request rank=0 {name}.rid={job.item.rid!r} {name}.bootstrap_room={room} "
            f"with exception KVTransferError(bootstrap_room={room}): {problem}",
            bootstrap=problem.bootstrap,
        )

    def _end(self, job: Job, problem: Exception, why: str) -> None:
        moment = now()
        if job.request:
            self.worker.abort(moment, job.request)
        self._leave_room(job, why)
        job.over = True
        job.done.set_exception(problem)
        self._arm()

    def _leave_room(self, job: Job, why: str) -> None:
        room = job.item.bootstrap_room
        if room is None:
            return
        if self._in_room.get(room) is job:
            del self._in_room[room]
            self.rooms.close(room, {"failed": room, "why": why})
        if job.link:
            job.link.leave(room)

    def _book(self, job: Job) -> None:
        """Keep SGLang's books: they are written when a request ends, however it ends."""
        self._jobs.pop(id(job), None)
        if job.request:
            # They hold each other, and the collector comes too seldom (cli.py) for a worker that serves for hours.
            job.request.tag = None
        self._leave_room(job, "the prefill worker is done")
        if job.timer:
            job.timer.cancel()
        metrics, own, moment = self.metrics, job.stream, now()
        metrics.requests.inc(1, own)
        metrics.prompt_tokens.inc(job.item.prompt.tokens, own)
        metrics.generation_tokens.inc(job.sent, own)
        if job.cached_tokens:
            metrics.cached_tokens.inc(job.cached_tokens, "device")
        metrics.e2e.observe(moment - job.arrived, own)
        if job.sent and self.role != "prefill":  # as in SGLang: a prefill worker has neither
            metrics.ttft.observe(job.first_at - job.arrived, own)
            if job.sent == job.tokens > 1:
                metrics.tpot.observe((job.last_at - job.first_at) / (job.sent - 1), own)
