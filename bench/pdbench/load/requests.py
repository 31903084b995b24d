"""The list of requests of a load point: drawn in full, in order, before the first is sent."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pdbench.load.arrivals import Rate, schedule
from pdbench.load.dataset import Content, Entry
from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.load.prompts import Piece
from pdbench.load.trace import Row, Scaling

_AS_IT_IS = Scaling()


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send: its place in the list, lengths in tokens, and when (None: as soon as a slot is free).

    ``after``: the request that must have ended ``think_s`` seconds before, ``due_s`` is None then. ``answers``: requests
    whose real answers go into this prompt where prompts are text. ``pieces``: what the prompt is made of, () for one piece
    of its own; ``content``: the prompt as a file has it, instead.
    """

    index: int
    isl: int
    osl: int
    due_s: float | None = None
    after: int | None = None
    think_s: float = 0.0
    answers: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    content: Content | None = None

    def __reduce__(self) -> tuple[type[Request], tuple[object, ...]]:
        """Leave the prompt behind: who sends a request in another process has its body."""
        return Request, (self.index, self.isl, self.osl, self.due_s, self.after, self.think_s, self.answers)


@dataclass(frozen=True)
class Prefix:
    """A system prompt of ``tokens`` tokens before every prompt, one of ``groups`` such, drawn evenly."""

    tokens: int
    groups: int = 1


@dataclass(frozen=True)
class Conversation:
    """How requests make conversations.

    ``turns`` questions each; ``think_s``: pause between an answer and the next question, uniform between the two, in
    seconds; ``context``: how many earlier questions with their answers a prompt repeats (None: all).
    """

    turns: Lengths
    think_s: tuple[float, float] = (0.0, 0.0)
    context: int | None = None

    @classmethod
    def parse(cls, turns: str, think: str = "0", context: str = "full") -> Conversation:
        """Read its three words: a length, ``2`` or ``1-5`` seconds, ``full`` or a number of turns; raise LoadError."""
        pause = re.fullmatch(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?", think, re.ASCII)
        low, high = (float(pause[1]), float(pause[2] or pause[1])) if pause else (1.0, 0.0)
        if low > high:
            raise LoadError(f"think: {think!r} is no pause; write seconds, such as 2, or 1-5 (uniform)")
        if context != "full" and not re.fullmatch(r"\d+", context, re.ASCII):
            raise LoadError(f"context: {context!r}; write full, or how many earlier turns a prompt repeats, such as 3")
        try:
            return cls(Lengths.parse(turns), (low, high), None if context == "full" else int(context))
        except LoadError as why:
            raise LoadError(f"turns: {why}") from None


@dataclass(frozen=True)
class Load:
    """What one load point sends.

    ``concurrency`` slots in a closed loop, or ``rate`` requests/s in an open one (with ``rate_to``, a ramp from ``rate``
    to it within ``ramp_s`` seconds), or ``replay``: the trace's own arrival times multiplied by it. Exactly one of the three
    is set. Lengths are drawn, or those of a trace's ``rows`` or a file's ``entries``; ``share``: prompts of a trace share
    the prefixes that their blocks name. In an open loop of conversations ``rate`` counts requests: conversations begin
    as much more seldom as they are long.
    """

    isl: Lengths | None
    osl: Lengths | None
    count: int
    seed: int
    rows: Sequence[Row] = ()
    concurrency: int | None = None
    rate: float | None = None
    arrival: str = "poisson"
    replay: float | None = None
    rate_to: float | None = None
    ramp_s: float = 0.0
    scaling: Scaling = _AS_IT_IS
    share: bool = False
    prefix: Prefix | None = None
    conversation: Conversation | None = None
    entries: Sequence[Entry] = ()

    @property
    def open_loop(self) -> bool:
        """Tell whether requests go out on time whatever the server does."""
        return self.concurrency is None

    @property
    def shared_prefix(self) -> bool:
        """Tell whether prompts of the point may begin alike, so that a prefix cache rightly helps."""
        return self.share or bool(self.entries) or self.prefix is not None or self.conversation is not None

    def measured(self) -> list[Request]:
        """Return the measured requests.

        They depend on the seed alone, not on the load (but for when they are sent), so that points and deployments can be
        compared in pairs.
        """
        return self._requests

    @cached_property
    def _requests(self) -> list[Request]:
        if self.conversation is not None:
            return self._timed(self._conversations(self.conversation))
        lengths = self._lengths(self.count, "lengths")
        if self.entries:
            return self._timed([Request(i, *size, content=self.entries[i].content) for i, size in enumerate(lengths)])
        return self._timed([self._request(i, *size, "measure") for i, size in enumerate(lengths)])

    def warmup(self, count: int) -> list[Request]:
        """Return warm-up requests of the same kind, always for a closed loop; each is by itself, and no measured one's like."""
        lengths = self._lengths(count, "warm-up lengths")
        return [self._request(i, isl, osl, "warmup", share=False) for i, (isl, osl) in enumerate(lengths)]

    def _timed(self, requests: list[Request]) -> list[Request]:
        heads = [request.index for request in requests if request.after is None]
        if self.rate is not None:
            part = len(heads) / len(requests)
            pace = Rate(self.rate * part, None if self.rate_to is None else self.rate_to * part, self.ramp_s)
            due = schedule(self.arrival, pace, len(heads), random.Random(f"{self.seed}/arrivals"))
        elif self.replay is not None:
            due = [row.arrival_s * self.replay for row in self.rows[: self.count]]
        else:
            return requests
        for index, at in zip(heads, due, strict=True):
            requests[index] = replace(requests[index], due_s=at)
        return requests

    def _request(self, index: int, isl: int, osl: int, phase: str, share: bool = True) -> Request:
        name = f"{phase}/{index}"
        if self.share and share:
            return Request(index, isl, osl, pieces=self.rows[index].pieces(name, index, self.scaling.length))
        if self.prefix is None:
            return Request(index, isl, osl)
        pieces = (self._prefix(name), Piece(name, isl, serial=index))
        return Request(index, self.prefix.tokens + isl, osl, pieces=pieces)

    def _prefix(self, name: str) -> Piece:
        assert self.prefix is not None
        group = random.Random(f"{self.seed}/group/{name}").randrange(self.prefix.groups)
        return Piece(f"prefix/{group}", self.prefix.tokens, "system")

    def _conversations(self, how: Conversation) -> list[Request]:
        turns, pauses = (random.Random(f"{self.seed}/{stream}") for stream in ("turns", "think"))
        lengths = self._lengths(self.count, "lengths")
        requests: list[Request] = []
        while len(requests) < self.count:
            begin = len(requests)
            for index in range(begin, min(self.count, begin + how.turns.draw(turns))):
                first = max(begin, index - (self.count if how.context is None else how.context))
                requests.append(self._turn(begin, first, index, lengths, pauses.uniform(*how.think_s)))
        return requests

    def _turn(self, begin: int, first: int, index: int, lengths: Sequence[tuple[int, int]], think_s: float) -> Request:
        """Return request ``index`` of the conversation that began with ``begin``; ``first`` is the earliest turn repeated."""
        before = () if self.prefix is None else (self._prefix(f"measure/{begin}"),)
        size = sum(piece.tokens for piece in before) + lengths[index][0] + sum(map(sum, lengths[first:index]))
        while self.scaling.max_isl is not None and size > self.scaling.max_isl and first < index:
            size -= sum(lengths[first])
            first += 1
        past = [
            piece
            for j in range(first, index)
            for piece in (
                Piece(f"measure/{j}", lengths[j][0], serial=j),
                Piece(f"measure/{j}/answer", lengths[j][1], "assistant", answer=j),
            )
        ]
        pieces = (*before, *past, Piece(f"measure/{index}", lengths[index][0], serial=index))
        request = Request(index, size, lengths[index][1], answers=tuple(range(first, index)), pieces=pieces)
        return request if index == begin else replace(request, after=index - 1, think_s=think_s)

    def _lengths(self, count: int, stream: str) -> list[tuple[int, int]]:
        if self.rows:
            return [(row.isl, row.osl) for row in (self.rows[i % len(self.rows)] for i in range(count))]
        rng = random.Random(f"{self.seed}/{stream}")
        if self.entries:
            found = (self.entries[i % len(self.entries)] for i in range(count))
            return [(e.isl, self.scaling.osl(e.osl if self.osl is None else self.osl.draw(rng))) for e in found]
        if self.isl is None or self.osl is None:
            raise ValueError("a load needs lengths, a trace or a file of prompts")
        return [(self.scaling.isl(self.isl.draw(rng)), self.scaling.osl(self.osl.draw(rng))) for _ in range(count)]
