"""One item on its way through an emulated worker, and where its tokens go."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

from pdbench.emulate.asks import Item
from pdbench.emulate.handshake import HandshakeError, Kv, Link
from pdbench.model.requests import Request

if TYPE_CHECKING:
    from pdbench.emulate.engine import Engine

#: The output of a worker whose transfer is a fake (warm-up): made of no prompt at all, as it is there.
NO_KV = bytes(32)

# uvloop's own clock stands still within a turn of the loop and counts whole milliseconds; hence this one.
now = time.monotonic


class AbortedError(Exception):
    """A request that was aborted: by its client, or by `/abort_request`."""

    status = 503


class Sink(Protocol):
    """Where output tokens go."""

    def token(self, job: Job, index: int, last: bool) -> None:
        """Take output token `index` (from 0), which is due now. Must be quick and must not raise."""


class Job:
    """One item on its way through the worker; also what the handshake of a decode worker reports to."""

    def __init__(self, engine: Engine, item: Item, stream: bool, sink: Sink | None) -> None:
        """Start it with `Engine.start`."""
        self.item, self.stream, self.sink = item, "true" if stream else "false", sink
        self.tokens = 1 if engine.role == "prefill" else item.output_tokens
        self.digest = NO_KV if item.fake_transfer and engine.role == "decode" else item.prompt.digest
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.arrived = now()
        self.first_at = self.last_at = 0.0
        self.sent = 0
        self.over = False
        self.request: Request | None = None
        self.link: Link | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.found_at = self.granted_at = 0.0
        self.moved = False
        self._engine = engine

    @property
    def cached_tokens(self) -> int:
        """Return the prompt tokens that came from the prefix cache."""
        return self.request.cached if self.request else 0

    @property
    def retractions(self) -> int:
        """Return how often it lost its KV memory to others."""
        return self.request.retractions if self.request else 0

    def on_found(self) -> None:
        """Decode: the prefill worker is there, too."""
        self._engine.found(self)

    def on_kv(self, kv: Kv) -> None:
        """Decode: the KV left the prefill worker."""
        self._engine.kv_came(self, kv)

    def on_failed(self, problem: HandshakeError) -> None:
        """Decode: the KV will not come; one that computes the prompt itself (a fault) does not need it."""
        if self.request is None or self.request.way != "local":
            self._engine.fail(self, problem)
