"""When to change the ratio while serving: a pure rule on what workers say of their queues.

It knows nothing of simulations or of engines: whoever drives it measures an `Observed` every few seconds (in SGLang's words:
queue_time_seconds and num_queue_reqs of prefill workers, inter_token_latency_seconds, num_decode_prealloc_queue_reqs, token_usage
and num_running_reqs of decode workers), carries out what it says, and tells it when that is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

#: which role gets a worker that the other one gives
Move = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Observed:
    """One window. ``prefill``, ``decode``: workers that take requests.

    ``prefill_wait_s``: how long prompts wait for prefill; ``decode_wait_s``: for memory or a place on a decode worker;
    ``itl_s``: mean gap between tokens; ``decode_full``: the share of what decode workers have at most (KV memory, running
    requests, front-end process), the fullest counts.
    """

    prefill: int
    decode: int
    prefill_wait_s: float
    decode_wait_s: float
    itl_s: float
    decode_full: float


@dataclass(frozen=True)
class Rule:
    """Limits and patience.

    ``ttft_s``, ``itl_s``: what users are promised. A role is pressed when its pressure (1: the promise is just kept) is above
    ``high``, and can give a worker when its pressure, raised to what the others would then have, is below ``low``. Both must
    hold in ``patience`` windows in a row, and ``rest_s`` must have passed since the change before was done.
    """

    ttft_s: float
    itl_s: float
    high: float = 0.5
    low: float = 0.7
    patience: int = 2
    rest_s: float = 30.0
    #: more of what a decode worker has than this is as good as all
    full: float = 0.9


@dataclass
class Controller:
    """The rule's memory: what it has seen in a row, and when the last change was done (in s on the driver's clock)."""

    rule: Rule
    wanted: Move | None = None
    seen: int = 0
    changed_at: float = field(default=-float("inf"))
    changing: bool = False

    def decide(self, now: float, observed: Observed) -> Move | None:
        """Return which role should get a worker now, or None. After a move it waits for `done`."""
        wanted = wish(self.rule, observed)
        self.seen = self.seen + 1 if wanted == self.wanted else 1
        self.wanted = wanted
        if wanted is None or self.changing or self.seen < self.rule.patience or now - self.changed_at < self.rule.rest_s:
            return None
        self.changing, self.seen = True, 0
        return wanted

    def done(self, now: float) -> None:
        """Hear that the worker serves in its new role (or that the change failed)."""
        self.changing, self.changed_at = False, now


def pressures(rule: Rule, observed: Observed) -> tuple[float, float]:
    """Return the pressure on prefill and on decode; 1: the promise is just kept."""
    prefill = observed.prefill_wait_s / rule.ttft_s
    decode = max(observed.itl_s / rule.itl_s, observed.decode_wait_s / rule.ttft_s, observed.decode_full / rule.full)
    return prefill, decode


def wish(rule: Rule, observed: Observed) -> Move | None:
    """Return which role should get a worker of the other, by this window alone; None when neither should.

    What a role would have without one worker: the same load on fewer. Decode's pressure grows by n / (n - 1), its latency by
    less, as steps have a fixed part: so it errs towards staying. A queue in front of prefill has no such law: to give a worker,
    it must be all but empty.
    """
    prefill, decode = pressures(rule, observed)
    if prefill > rule.high and observed.decode > 1 and decode * observed.decode / (observed.decode - 1) < rule.low:
        return "prefill"
    if decode > 1.0 and observed.prefill > 1 and prefill * observed.prefill / (observed.prefill - 1) < rule.low * rule.high:
        return "decode"
    return None
