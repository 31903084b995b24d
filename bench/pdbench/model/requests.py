"""What goes through a worker's scheduler, and what it tells: requests, tokens, steps, news for other workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pdbench.model.radix import Node

#: `local`: prefill and decode here; `send`: prefill here, KV goes to a decode worker; `receive`: KV comes from a prefill worker.
Way = Literal["local", "send", "receive"]
State = Literal[
    "frontend", "bootstrap", "prealloc", "transfer", "waiting", "prefill", "sending", "ready", "running", "retracted", "done"
]
FOREVER = float("inf")


class Request:
    """One prompt on one worker. `prompt` is packed token ids, or empty where no prefix cache looks at it."""

    __slots__ = (
        *("arrived", "base", "began", "cached", "computed", "entered", "generated", "matched", "node", "output_tokens", "own"),
        *("peer", "prompt", "prompt_tokens", "queued", "retractions", "sent_bytes", "state", "tag", "transport", "way"),
    )

    def __init__(
        self,
        way: Way,
        prompt_tokens: int,
        output_tokens: int,
        prompt: bytes = b"",
        peer: str = "",
        transport: str = "",
        tag: object = None,
    ) -> None:
        """Give lengths in tokens; `peer` and `transport` are needed to send or receive; `tag` is the driver's own."""
        self.way, self.prompt_tokens, self.output_tokens, self.prompt = way, prompt_tokens, output_tokens, prompt
        self.peer, self.transport, self.tag = peer, transport, tag
        self.state: State = "frontend"
        self.arrived = self.entered = self.queued = 0.0
        self.began = -1.0
        self.generated = self.own = self.base = self.computed = self.cached = self.retractions = self.sent_bytes = 0
        self.matched = False
        self.node: Node | None = None

    @property
    def context(self) -> int:
        """Return the tokens whose KV it needs."""
        return self.prompt_tokens + self.generated


class Event(NamedTuple):
    """Something that another worker has to know, at time `at`.

    `granted`: decode has memory, prefill may begin; `sent`: the last KV left the prefill; `answered`: the prefill worker found
    that out, and answers; `took` is then how long that is after the end of the last chunk's computation, in seconds.
    """

    at: float
    kind: Literal["granted", "sent", "answered"]
    request: Request
    took: float = 0.0


#: An output token that reaches the client: when it does, of which request, its number from 0.
Token = tuple[float, Request, int]


@dataclass(frozen=True)
class Step:
    """One pass over the model: `tokens` are those computed, `context` those that were in the cache."""

    start: float
    end: float
    kind: Literal["prefill", "decode"]
    requests: int
    tokens: int
    context: int


@dataclass(frozen=True)
class Limits:
    """What a worker was started with; `capacity` is in tokens of KV cache."""

    capacity: int
    max_running: int
    chunk: int
    reserved: int
    prefix_cache: bool
