"""One worker's scheduler as a state machine: what SGLang 0.5.23 does with requests, given how long each step takes.

It never sleeps and reads no clock: whoever drives it tells the time. Every call takes `now` in seconds on the driver's clock;
`advance(now)` lets everything happen that was due until then, each at its own time, so that a driver that wakes up late gets the
same schedule as one that does not. `next_at` says when to call again.

What it follows:

- prefill before decode, first in first out, chunked prefill: `Scheduler._get_new_batch_prefill`, `PrefillAdder`;
- admission by memory, with a new-token ratio that decays: `NewTokenRatioTracker`;
- retraction of the requests with the fewest outputs: `ScheduleBatch.retract_decode`;
- decode pre-allocation with reserved tokens: `DecodePreallocQueue.pop_preallocated`;
- KV sent chunk by chunk while the next chunk computes: `send_kv_chunk`; a prefill worker looks between two steps which transfers
  are over, and answers those requests: `process_disagg_prefill_inflight_queue`;
- a prefix cache on workers that compute prompts; one front-end process through which every request and token goes.

Left out: overlap of steps with scheduling, speculative decoding, priorities, the time to restore a retracted request's KV, and
the prefix that a finished answer adds to the cache.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import count

from pdbench.model.links import Links
from pdbench.model.memory import Memory
from pdbench.model.rates import Rates
from pdbench.model.requests import FOREVER, Event, Request, State, Token
from pdbench.model.requests import Limits as Limits
from pdbench.model.requests import Step as Step

#: SGLang's environ.py and schedule_policy.py
INIT_NEW_TOKEN_RATIO = 0.7
MIN_NEW_TOKEN_RATIO = 0.7 * 0.14
RATIO_DECAY = (INIT_NEW_TOKEN_RATIO - MIN_NEW_TOKEN_RATIO) / 600
RETRACT_STEPS = 20
CLIP_MAX_NEW_TOKENS = 4096


class Worker:
    """One worker; see the module's text."""

    def __init__(self, rates: Rates, limits: Limits) -> None:
        """Start idle, at any time."""
        self.rates, self.limits = rates, limits
        self.memory = Memory(limits)
        self.links = Links(rates)
        self.states: Counter[State] = Counter()
        self.slow_down_s = 0.0
        #: what a request takes to come here, in s: only where no router, HTTP and sockets take their own time
        self.outside_s = 0.0
        #: without it, only the first and the last token of a request leave: all that some simulations ask for
        self.every_token = True
        self.on_step: Callable[[Step], None] | None = None
        #: hears of every first wait and forward pass of a request: SGLang's name of the stage, and its seconds
        self.on_stage: Callable[[str, float], None] = lambda stage, seconds: None
        self.retracted = self.hit_tokens = self.asked_tokens = 0
        self._frontend_token = rates.profile.engine.frontend_us_per_token / 1e6
        self._frontend_request = rates.profile.engine.frontend_us_per_request / 1e6
        self._frontend_free = -FOREVER
        self._tokens: deque[Token] = deque()  # on their way through the front end, in order of time
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._out: list[Event] = []
        self._waiting: deque[Request] = deque()
        self._prealloc: deque[Request] = deque()
        self._ready: deque[Request] = deque()
        self._retracted: deque[Request] = deque()
        #: prefill: requests whose KV is there, unanswered, and when each was computed
        self._landed: list[tuple[Request, float]] = []
        self._chunked: Request | None = None
        self._running: list[Request] = []
        self._context = 0
        self._busy = False
        self._ratio = INIT_NEW_TOKEN_RATIO

    # ---- what the driver calls

    def submit(self, now: float, request: Request) -> None:
        """Take a request. One that could never fit raises ValueError."""
        need = request.prompt_tokens + (0 if request.way == "send" else request.output_tokens)
        if need > self.limits.capacity:
            raise ValueError(f"the request needs {need} tokens of KV cache, and the worker has {self.limits.capacity}")
        self._catch_up(now)
        request.arrived = now
        self.states["frontend"] += 1
        if not self._frontend_request + self.outside_s:
            return self._enter(now, request)
        self._frontend_free = max(self._frontend_free, now) + self._frontend_request
        self._at(self._frontend_free + self.outside_s, lambda at: self._enter(at, request))
        return None

    def grant(self, now: float, request: Request) -> None:
        """Prefill: the decode worker has memory for this request."""
        self._catch_up(now)
        if request.state == "frontend":
            request.matched = True
        elif request.state == "bootstrap":
            request.queued = now
            self._set(request, "waiting")
            self._waiting.append(request)
            self._kick(now)

    def found(self, now: float, request: Request) -> None:
        """Decode: the prefill worker knows of this request."""
        self._catch_up(now)
        request.matched = True
        if request.state == "prealloc":
            self._kick(now)

    def deliver(self, now: float, request: Request, size: int) -> None:
        """Decode: the last of `size` bytes of KV left the prefill worker; it is here when the own link has taken it."""
        self._catch_up(now)
        if request.state != "transfer":
            return
        self._at(self.links.receive(now, request, size), lambda at: self._arrived(at, request))

    def abort(self, now: float, request: Request) -> None:
        """Forget a request, whatever it is doing; the step that computes it goes on without it."""
        self._catch_up(now)
        if request.state == "done":
            self._tokens = deque(token for token in self._tokens if token[1] is not request)
            return
        for queue in (self._waiting, self._prealloc, self._ready, self._retracted):
            if request in queue:
                queue.remove(request)
        if request is self._chunked:
            self._chunked = None
        if request in self._running:
            self._running.remove(request)
            self._context -= request.context
        self._finish(request)
        self._tokens = deque(token for token in self._tokens if token[1] is not request)
        self._kick(now)

    def advance(self, now: float) -> list[Event]:
        """Let everything happen that is due until `now`; return what other workers have to know. `tokens` gives the tokens."""
        self._catch_up(now)
        out, self._out = self._out, []
        return out

    def tokens(self, now: float, most: float = FOREVER) -> list[Token]:
        """Return the tokens that reach their clients until `now`, in order of time, after `advance(now)`.

        At most `most` leave at once; the others stay due, and `next_at` says so.
        """
        due = self._tokens
        if most >= len(due) and due and due[-1][0] <= now:
            out = list(due)
            due.clear()
            return out
        out = []
        while due and due[0][0] <= now and len(out) < most:
            out.append(due.popleft())
        return out

    @property
    def next_at(self) -> float:
        """Return when something will happen by itself (inf: nothing will)."""
        if self._out:
            return -FOREVER
        one = self._events[0][0] if self._events else FOREVER
        return min(one, self._tokens[0][0]) if self._tokens else one

    @property
    def idle(self) -> bool:
        """Whether no request is here."""
        return not any(self.states.values()) and not self._tokens

    @property
    def used(self) -> int:
        """Return the tokens of KV cache in use by requests; what only the prefix cache holds is not."""
        return self.memory.used

    @property
    def pending_tokens(self) -> int:
        """Return the prompt tokens that wait for memory on a decode worker."""
        return sum(request.prompt_tokens for request in self._prealloc)

    @property
    def link_busy(self) -> Mapping[str, float]:
        """Return the seconds that its links were taken by KV, out and in, by transport."""
        return self.links.busy

    def connect(self, peer: str) -> None:
        """Take the connection to a decode worker for made, as after the first request of a pair."""
        self.links.connect(peer)

    def change(self, limits: Limits) -> None:
        """Go on with other limits; no request is here."""
        self.limits = self.memory.limits = limits

    def flush(self) -> int:
        """Drop the prefix cache; return the tokens."""
        return self.memory.cache.clear()

    # ---- inside

    def _catch_up(self, now: float) -> None:
        while self._events and self._events[0][0] <= now:
            at, _, action = heapq.heappop(self._events)
            action(at)

    def _set(self, request: Request, state: State) -> None:
        self.states[request.state] -= 1
        request.state = state
        if state != "done":
            self.states[state] += 1

    def _at(self, at: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), action))

    def _enter(self, now: float, request: Request) -> None:
        """Leave the front end for the scheduler."""
        if request.state == "done":
            return
        request.entered = now
        if request.way == "receive":
            self._set(request, "prealloc")
            self._prealloc.append(request)
        elif request.way == "send" and not request.matched:
            self._set(request, "bootstrap")
            return
        else:
            request.queued = now
            self._set(request, "waiting")
            self._waiting.append(request)
        self._kick(now)

    def _emit(self, at: float, request: Request) -> None:
        index = request.generated
        request.generated += 1
        if self._frontend_token:
            self._frontend_free = max(self._frontend_free, at) + self._frontend_token
            at = self._frontend_free
        self._tokens.append((at, request, index))

    def _finish(self, request: Request) -> None:
        self._set(request, "done")
        self.memory.release(request)

    # ---- the loop: one step at a time

    def _kick(self, now: float) -> None:
        if not self._busy:
            self._next(now)

    def _next(self, now: float) -> None:
        """Choose the next step, as SGLang's event loops do: what is ready joins, then prefill, then decode."""
        self._preallocate(now)
        while self._join(now):
            self._preallocate(now)
        chunks = self._choose_prefill()
        if chunks:
            return self._start_prefill(now, chunks)
        if self._running:
            self._make_room()
            if self._running:
                return self._start_decode(now)
        return None

    def _preallocate(self, now: float) -> None:
        """Decode: give memory to requests that wait for it, first come first served, retracted ones before all."""
        if not (self._prealloc or self._retracted):
            return
        holding = len(self._running) + len(self._ready) + self.states["transfer"]
        if holding >= self.limits.max_running:
            return
        reserved = self.limits.reserved
        least, retractable = reserved * holding, self._context
        if least < CLIP_MAX_NEW_TOKENS:  # what a lone request lacks is never more than that
            lone = max((r.prompt_tokens + min(r.output_tokens, CLIP_MAX_NEW_TOKENS) for r in self._running), default=0)
            least = max(least, lone - retractable)
        room = self.memory.free() - least
        while self._retracted and holding < self.limits.max_running:
            request = self._retracted[0]
            if request.context + reserved > room and holding:
                return
            room -= request.context + reserved
            holding += 1
            self._retracted.popleft()
            request.own = request.context
            self.memory.take(request.own)
            self._set(request, "ready")
            self._ready.append(request)
        waiting, place = self._prealloc, 0
        while place < len(waiting):
            request = waiting[place]
            if not request.matched:
                place += 1
                continue
            if holding >= self.limits.max_running:
                return
            whole = request.prompt_tokens + min(request.output_tokens, CLIP_MAX_NEW_TOKENS)
            # A lone request that fits the memory must get it: it can be retracted for nobody.
            if holding and max(request.prompt_tokens + reserved, whole - retractable) > room:
                return
            room -= request.prompt_tokens + reserved
            holding += 1
            del waiting[place]
            request.own = request.prompt_tokens
            self.memory.take(request.own)
            request.queued = now
            self._set(request, "transfer")
            self._out.append(Event(now, "granted", request))

    def _arrived(self, now: float, request: Request) -> None:
        if request.state == "transfer":
            self.on_stage("decode_transferred", now - request.queued)
            request.queued = now
            self._set(request, "ready")
            self._ready.append(request)
            self._kick(now)

    def _join(self, now: float) -> bool:
        """Decode: requests whose KV is there join the batch; their first token was made by the prefill worker.

        Returns whether some were done with that token, and left room for others.
        """
        left = False
        while self._ready and len(self._running) < self.limits.max_running:
            request = self._ready.popleft()
            if not request.generated:
                self.on_stage("decode_waiting", now - request.queued)
                self._emit(now, request)
            if request.generated >= request.output_tokens:
                self._finish(request)
                left = True
            else:
                self._start_running(request)
        return left

    def _start_running(self, request: Request) -> None:
        self._set(request, "running")
        self._running.append(request)
        self._context += request.context

    def _choose_prefill(self) -> list[tuple[Request, int]]:
        """Return (request, new tokens) of the next prefill step, within the chunk budget and the memory."""
        if not (self._chunked or self._waiting):
            return []
        budget, chunks = self.limits.chunk, []
        future = sum(min(r.output_tokens - r.generated, CLIP_MAX_NEW_TOKENS) for r in self._running) * self._ratio
        room = self.memory.free() - future
        slots = self.limits.max_running - len(self._running)
        if self._chunked:
            request = self._chunked
            new = min(budget, request.context - request.computed, int(self.memory.free()))
            if new <= 0:
                return []
            chunks.append((request, new))
            self._chunk(request, new)
            budget -= new
            room -= new
            slots -= 1
        while self._waiting and budget > 0 and slots > 0:
            request = self._waiting[0]
            self.memory.look_up(request)
            room = min(room, self.memory.free() - future)  # locking a prefix takes it from what can be had
            left = request.context - request.computed
            out = 0 if request.way == "send" else min(request.output_tokens - request.generated, CLIP_MAX_NEW_TOKENS)
            alone = not self._running and not chunks
            if left + out > room and not (alone and left + out <= self.memory.free()):
                self.memory.release(request)
                break
            new = min(left, budget)
            self._waiting.popleft()
            self._set(request, "prefill")
            if not request.retractions:
                request.cached = request.base
                self.hit_tokens += request.base
                self.asked_tokens += request.prompt_tokens
            chunks.append((request, new))
            self._chunk(request, new)
            budget -= new
            room -= left + out
            slots -= 1
        return chunks

    def _chunk(self, request: Request, new: int) -> None:
        request.own += new
        self.memory.take(new)
        self._chunked = request if request.computed + new < request.context else None

    def _start_prefill(self, now: float, chunks: list[tuple[Request, int]]) -> None:
        took = self.rates.prefill_s((new, request.computed) for request, new in chunks) + self.slow_down_s
        self._busy = True
        for request, _ in chunks:
            if request.began < 0:
                request.began = now
                self.on_stage("prefill_waiting", now - request.queued)
        self._at(now + took, lambda at: self._end_prefill(at, chunks))
        if self.on_step:
            tokens, context = sum(new for _, new in chunks), sum(request.computed for request, _ in chunks)
            self.on_step(Step(now, now + took, "prefill", len(chunks), tokens, context))

    def _end_prefill(self, now: float, chunks: list[tuple[Request, int]]) -> None:
        self._busy = False
        for request, new in chunks:
            if request.state == "done":
                continue
            request.computed += new
            complete = request.computed >= request.context
            if request.way == "send":
                self._send(now, request, complete)
            if not complete:
                continue
            if not request.retractions:
                self.on_stage("prefill_forward", now - request.began)
            self.memory.remember(request)
            if request.way == "send":
                self._set(request, "sending")
                continue
            self._emit(now, request)
            if request.generated >= request.output_tokens:
                self._finish(request)
            else:
                self._start_running(request)
        self._poll(now)
        self._next(now)

    def _send(self, now: float, request: Request, last: bool) -> None:
        """Put what is computed on the link to the decode worker, where it waits its turn."""
        tokens = request.computed
        size = self.rates.kv_bytes(tokens) - request.sent_bytes
        request.sent_bytes += size
        there = self.links.send(now, request, size)
        if last:
            self._at(there, lambda at: self._sent(at, request, now))

    def _sent(self, now: float, request: Request, computed: float) -> None:
        if request.state == "done":
            return
        self._out.append(Event(now, "sent", request))
        self._landed.append((request, computed))
        if not self._busy:
            self._poll(now)
            self._next(now)

    def _poll(self, now: float) -> None:
        """Prefill: answer those whose KV is there; nobody looks while a step computes, so they wait for its end."""
        landed, self._landed = self._landed, []
        for request, computed in landed:
            if request.state == "done":
                continue
            self._out.append(Event(now, "answered", request, now - computed))
            while request.generated < request.output_tokens:  # a prefill worker answers with its one token
                self._emit(now, request)
            self._finish(request)

    def _start_decode(self, now: float) -> None:
        batch = len(self._running)
        for request in self._running:
            request.own += 1
        self.memory.take(batch)
        took = self.rates.decode_s(batch, self._context) + self.slow_down_s
        self._busy = True
        self._at(now + took, self._end_decode)
        self._ratio = max(self._ratio - RATIO_DECAY, MIN_NEW_TOKEN_RATIO)
        if self.on_step:
            self.on_step(Step(now, now + took, "decode", batch, batch, self._context))

    def _end_decode(self, now: float) -> None:
        self._busy = False
        stay = []
        # `_emit` for every request, written out: nothing else of a simulation runs as often.
        put, cost, every = self._tokens.append, self._frontend_token, self.every_token
        at = max(self._frontend_free, now) if cost else now
        for request in self._running:
            index = request.generated
            request.generated = index + 1
            at += cost
            if every:
                put((at, request, index))
            if index + 1 < request.output_tokens:
                stay.append(request)
            else:
                if not every:
                    put((at, request, index))
                self._context -= request.context - 1
                self._finish(request)
        if cost:
            self._frontend_free = at
        self._running = stay
        self._context += len(stay)
        self._next(now)

    def _make_room(self) -> None:
        """Retract requests, those with the fewest outputs first, until every other one has room for a token."""
        if self.memory.free() >= len(self._running):
            return
        while len(self._running) > 1:
            victim = min(self._running, key=lambda r: (r.generated, -r.prompt_tokens))
            self._running.remove(victim)
            self._context -= victim.context
            self.memory.release(victim)
            victim.retractions += 1
            self.retracted += 1
            if victim.way == "receive":
                self._set(victim, "retracted")
                self._retracted.append(victim)
            else:
                self._set(victim, "waiting")
                self._waiting.append(victim)
            if self.memory.free() >= len(self._running):
                break
        done = sum(r.generated for r in self._running)
        most = sum(r.output_tokens for r in self._running)
        self._ratio = min(1.0, (done + RETRACT_STEPS * len(self._running)) / (most + 1))
