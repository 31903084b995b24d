"""A worker's links to others: what of the KV travels when, one piece after the other on each transport."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from pdbench.model.rates import Rates
from pdbench.model.requests import FOREVER, Request


class Links:
    """Times are seconds on the driver's clock, sizes bytes."""

    def __init__(self, rates: Rates) -> None:
        """Start with no connection made."""
        self.rates = rates
        #: how many times as long as usual a transfer from or to a peer takes
        self.factor: Callable[[str], float] = lambda peer: 1.0
        #: seconds that they were taken by KV, out and in, by transport
        self.busy: defaultdict[str, float] = defaultdict(float)
        self._egress_free: dict[str, float] = {}
        self._ingress_free: dict[str, float] = {}
        self._connected: dict[str, float] = {}

    def connect(self, peer: str) -> None:
        """Take the connection to a decode worker for made, as after the first request of a pair."""
        self._connected[peer] = -FOREVER

    def send(self, now: float, request: Request, size: int) -> float:
        """Put `size` bytes on the link to the request's decode worker, where they wait their turn; return when they are there."""
        key = request.transport
        way = self.rates.profile.transports[key]
        start = max(now, self._egress_free.get(key, -FOREVER))
        end = start + self._take(request, size)
        self._egress_free[key] = end
        connected = self._connected.setdefault(request.peer, start + way.setup_ms / 1e3)
        return max(end, connected) + way.latency_ms / 1e3

    def receive(self, now: float, request: Request, size: int) -> float:
        """Return when the last of `size` bytes is here, which left the prefill worker by `now`."""
        key = request.transport
        here = max(now, self._ingress_free.get(key, -FOREVER) + self._take(request, size))
        self._ingress_free[key] = here
        return here

    def _take(self, request: Request, size: int) -> float:
        took = self.rates.transfer_s(size, request.transport) * self.factor(request.peer)
        self.busy[request.transport] += took
        return took
