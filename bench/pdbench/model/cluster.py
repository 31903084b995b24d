"""A whole deployment in virtual time: the workers of `pdbench.model.scheduler`, a router, a load.

What `pdbench emulate` does over sockets and against the wall clock happens here as calls, at the same times.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from pdbench.model.radix import pack
from pdbench.model.rates import Rates
from pdbench.model.requests import FOREVER, Event, Limits, Request, Token
from pdbench.model.scheduler import Worker


@dataclass(frozen=True)
class Prompt:
    """What a client sends: lengths in tokens; `ids` only where prefixes are shared. `due` in s, for an open loop."""

    prompt_tokens: int
    output_tokens: int
    due: float = 0.0
    ids: tuple[int, ...] = ()


@dataclass
class Outcome:
    """What a client sees of one prompt; times in s of the run. `failed` says why it was refused.

    `memory_wait`: how long it waited for memory (or a free place) on its decode worker, before prefill could begin, in s.
    """

    prompt: Prompt
    sent: float
    tokens: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    retractions: int = 0
    memory_wait: float = 0.0
    failed: str = ""

    @property
    def ttft(self) -> float:
        """Return the time to first token."""
        return self.tokens[0] - self.sent

    @property
    def end(self) -> float:
        """Return when the last token came."""
        return self.tokens[-1]


Role = Literal["prefill", "decode", "aggregated"]


@dataclass
class Deployment:
    """Prefill and decode workers, or aggregated ones; `transport(prefill index, decode index)` names the way between two."""

    prefill: list[Worker] = field(default_factory=list)
    decode: list[Worker] = field(default_factory=list)
    aggregated: list[Worker] = field(default_factory=list)
    transport: Callable[[int, int], str] = lambda prefill, decode: "cuda_ipc"


def limits(rates: Rates, *, prefix_cache: bool = False) -> Limits:
    """Return a worker's limits as its profile has them."""
    engine = rates.profile.engine
    return Limits(
        capacity=rates.capacity_tokens(),
        max_running=engine.max_running_requests,
        chunk=engine.chunked_prefill_tokens,
        reserved=engine.reserved_decode_tokens,
        prefix_cache=prefix_cache,
    )


def deployment(rates: Rates, prefill: int, decode: int, aggregated: int = 0, **others: Callable[[int, int], str]) -> Deployment:
    """Return like workers in a ratio."""
    own = limits(rates)

    def some(number: int) -> list[Worker]:
        return [Worker(rates, own) for _ in range(number)]

    return Deployment(some(prefill), some(decode), some(aggregated), **others)


class Simulation:
    """One run of a deployment under a load; workers must be idle at the start."""

    def __init__(self, cluster: Deployment, *, message_s: float = 0.0, warm: bool = True, every_token: bool = True) -> None:
        """`message_s`: how long a word between two workers takes; `warm`: every pair has been used before.

        `every_token`: outcomes keep the times of all tokens; without it, of the first and the last, which takes less memory.
        """
        self._cluster, self._message_s, self._every_token = cluster, message_s, every_token
        for worker in (*cluster.prefill, *cluster.decode, *cluster.aggregated):
            self._take_in(worker)
        for sender in cluster.prefill if warm else ():
            for place in range(len(cluster.decode)):
                sender.connect(f"decode-{place}")
        self._pools: dict[Role, list[Worker]] = {
            "prefill": cluster.prefill,
            "decode": cluster.decode,
            "aggregated": cluster.aggregated,
        }
        self._workers = [worker for pool in self._pools.values() for worker in pool]
        #: places in the deployment's lists of the workers that take requests, and whose turn it is
        self._open: dict[Role, list[int]] = {role: list(range(len(pool))) for role, pool in self._pools.items()}
        self._turns: dict[Role, int] = dict.fromkeys(self._pools, 0)
        self._calls: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._on_done: Callable[[float], None] | None = None
        self.now = 0.0

    def open_loop(self, prompts: Sequence[Prompt]) -> list[Outcome]:
        """Send every prompt when it is due; return one outcome a prompt, in their order."""
        outcomes = [Outcome(prompt, prompt.due) for prompt in prompts]
        for outcome in outcomes:
            self._call(outcome.sent, lambda at, outcome=outcome: self._send(at, outcome))  # type: ignore[misc]
        self._run()
        return outcomes

    def closed_loop(self, prompts: Sequence[Prompt], concurrency: int) -> list[Outcome]:
        """Keep `concurrency` prompts in flight; return one outcome a prompt, in their order."""
        outcomes = [Outcome(prompt, 0.0) for prompt in prompts]
        left = iter(outcomes)

        def one_more(at: float) -> None:
            outcome = next(left, None)
            if outcome is not None:
                outcome.sent = at
                self._send(at, outcome)

        self._on_done = one_more
        for _ in range(min(concurrency, len(prompts))):
            self._call(0.0, one_more)
        self._run()
        return outcomes

    def serving(self, role: Role) -> list[int]:
        """Return the places, in the deployment's list of a role, of the workers that take requests."""
        return list(self._open[role])

    def close(self, role: Role, place: int) -> Worker:
        """Send a worker no more requests; it ends those that it has. The last one of a role cannot go (ValueError)."""
        if self._open[role] == [place]:
            raise ValueError(f"{role} {place} is the last one")
        self._open[role].remove(place)
        return self._pools[role][place]

    def join(self, role: Role, worker: Worker) -> None:
        """Let another worker take requests; every pair has been used before."""
        pool = self._pools[role]
        self._open[role].append(len(pool))
        pool.append(worker)
        self._workers.append(worker)
        self._take_in(worker)
        for sender in self._cluster.prefill:
            for place in range(len(self._cluster.decode)):
                sender.connect(f"decode-{place}")

    def _take_in(self, worker: Worker) -> None:
        worker.every_token, worker.outside_s = self._every_token, worker.rates.profile.engine.request_ms / 1e3

    def leave(self, worker: Worker) -> None:
        """Forget a worker that was closed and is idle."""
        self._workers.remove(worker)

    def at(self, when: float, action: Callable[[float], None]) -> None:
        """Call `action` with the time when it is `when`, in s of the run."""
        self._call(when, action)

    def _call(self, at: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._calls, (at, next(self._order), action))

    def _run(self) -> None:
        """Go from event to event; at equal times, what workers do comes before what reaches them."""
        while True:
            nexts = [worker.next_at for worker in self._workers]
            at = min(nexts)
            call = self._calls[0][0] if self._calls else FOREVER
            if at == call == FOREVER:
                return
            self.now = max(self.now, min(at, call))
            if at <= call:
                worker = self._workers[nexts.index(at)]
                for event in worker.advance(self.now):
                    self._route(event)
                # Tokens on their way through the front end, too: it is settled when they arrive.
                for token in worker.tokens(FOREVER):
                    self._reaches(token)
            else:
                _, _, action = heapq.heappop(self._calls)
                action(self.now)

    def _reaches(self, token: Token) -> None:
        """A token has left its worker; the client gets nothing before prefill has answered, too.

        So does sglang-router, always; smg and mini-lb on the OpenAI routes, where prefill's headers come with its answer
        (tests/local/test_other_routers.py).
        """
        due, request, _ = token
        trip: _Trip = request.tag  # type: ignore[assignment]
        if request.way == "send":
            trip.answered = due
            held, trip.held = trip.held, []
            for early in held:
                self._reaches(early)
            return
        if trip.answered is None:
            trip.held.append(token)
            return
        at = max(due, trip.answered)
        trip.outcome.tokens.append(at)
        if token[2] == request.output_tokens - 1:
            self._ended(at, request, trip)

    def _send(self, now: float, outcome: Outcome) -> None:
        prompt, cluster = outcome.prompt, self._cluster
        ids = pack(prompt.ids) if prompt.ids else b""
        try:
            if cluster.aggregated:
                own = Request("local", prompt.prompt_tokens, prompt.output_tokens, ids, tag=_Trip(outcome, -FOREVER))
                cluster.aggregated[self._next("aggregated")].submit(now, own)
                return
            here, there = self._next("prefill"), self._next("decode")
            way = cluster.transport(here, there)
            trip = _Trip(outcome, None, cluster.prefill[here], cluster.decode[there])
            sender = Request("send", prompt.prompt_tokens, 1, ids, f"decode-{there}", way, trip)
            receiver = Request("receive", prompt.prompt_tokens, prompt.output_tokens, b"", f"prefill-{here}", way, trip)
            trip.pair = (sender, receiver)
            cluster.decode[there].submit(now, receiver)
            cluster.prefill[here].submit(now, sender)
        except ValueError as refusal:
            outcome.failed = str(refusal)
            self._done(now)
            return
        self._call(now + self._message_s, lambda at: cluster.decode[there].found(at, receiver))

    def _next(self, role: Role) -> int:
        """Return whose turn it is: round robin."""
        taking, turn = self._open[role], self._turns[role]
        self._turns[role] = turn + 1
        return taking[turn % len(taking)]

    def _route(self, event: Event) -> None:
        trip = event.request.tag
        assert isinstance(trip, _Trip)
        assert trip.pair
        assert trip.prefill
        assert trip.decode
        sender, receiver = trip.pair
        prefill, decode = trip.prefill, trip.decode
        if event.kind == "granted":
            self._call(event.at + self._message_s, lambda at: prefill.grant(at, sender))
        elif event.kind == "sent":
            self._call(event.at + self._message_s, lambda at: decode.deliver(at, receiver, sender.sent_bytes))

    def _ended(self, at: float, request: Request, trip: _Trip) -> None:
        computed, outcome = trip.pair[0] if trip.pair else request, trip.outcome
        outcome.cached_tokens, outcome.retractions = computed.cached, request.retractions
        outcome.memory_wait = computed.queued - computed.entered if trip.pair else 0.0
        self._call(at, self._done)

    def _done(self, now: float) -> None:
        if self._on_done:
            self._on_done(now)


@dataclass
class _Trip:
    """Who has to do with one prompt."""

    outcome: Outcome
    #: when prefill's answer came, None before; and tokens that wait for it
    answered: float | None
    prefill: Worker | None = None
    decode: Worker | None = None
    pair: tuple[Request, Request] | None = None
    held: list[Token] = field(default_factory=list)
