"""Faults that a test asks a worker for, so that every check of the gate can be seen to fail for the right reason.

One JSON object a fault: `{"kind": "fail_transfer", "peer": "10.0.0.1:8998", "count": 1}`. The peer of a transfer is
the other worker's host:port: on a prefill worker the port of the decode worker, on a decode worker the bootstrap port
of the prefill worker. `*` is everyone. A fault with a `count` ends after so many times, every
other one stays until it is cleared.
"""

from __future__ import annotations

import difflib
import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

#: Kind -> the keys that it may have beside `kind`; those with a `!` it must have.
KINDS: dict[str, tuple[str, ...]] = {
    "die": ("after_tokens",),
    "hang": (),
    "fail_transfer": ("peer", "count"),
    "corrupt": ("count",),
    "slow_link": ("peer", "factor!"),
    "zero_tokens": (),
    "recompute": (),
    "empty_first_chunk": (),
    "clear": (),
}
EVERYONE = "*"


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class BadFaultError(ValueError):
    """A fault that does not exist or is not complete; the message says what would be right."""


@dataclass
class Fault:
    """One active fault. `left` is how often it will still happen (None: no end), `factor` multiplies a transfer's time."""

    kind: str
    peer: str = EVERYONE
    left: int | None = None
    factor: float = 1.0

    def to_json(self) -> dict[str, object]:
        """Return what `/server_info` and `/emulated/fault` show."""
        shown: dict[str, object] = {"kind": self.kind}
        if "peer" in KINDS[self.kind]:
            shown["peer"] = self.peer
        if self.kind == "slow_link":
            shown["factor"] = self.factor
        if self.left is not None:
            shown["after_tokens" if self.kind == "die" else "count"] = self.left
        return shown


class Faults:
    """The faults of one worker: set over HTTP, asked by the engine and the server."""

    def __init__(self, die: Callable[[], None] = _die) -> None:
        """Start without faults; `die` ends the process as a crash does."""
        self._die = die
        self._active: list[Fault] = []
        self._note()

    @property
    def active(self) -> list[dict[str, object]]:
        """What is set now, in the order in which it was asked for."""
        return [fault.to_json() for fault in self._active]

    def add(self, body: object) -> Fault:
        """Set one fault, `clear` drops all; a newer one of the same kind and peer replaces the older. Raises BadFaultError.

        A `die` without `after_tokens` is only noted: the caller answers first, then calls `tokens_sent(0)`.
        """
        fault = _read(body)
        if fault.kind == "clear":
            self._active.clear()
        else:
            self._active = [old for old in self._active if (old.kind, old.peer) != (fault.kind, fault.peer)] + [fault]
        self._note()
        return fault

    def tokens_sent(self, count: int) -> None:
        """Count output tokens that went to clients; ends the process when a `die` says so."""
        for fault in self._active:
            if fault.kind == "die":
                fault.left = (fault.left or 0) - count
                if fault.left <= 0:
                    self._die()

    def fails(self, peer: str) -> bool:
        """Whether the transfer that begins now with this peer fails. Uses up one of the fault's count."""
        return self._happens("fail_transfer", peer)

    def corrupts(self) -> bool:
        """Whether the KV cache that arrives now is wrong. Uses up one of the fault's count."""
        return self._happens("corrupt", EVERYONE)

    def link_factor(self, peer: str) -> float:
        """Return by what a transfer's time with this peer is multiplied; the fault that names the peer wins over `*`."""
        slow = {fault.peer: fault.factor for fault in self._active if fault.kind == "slow_link"}
        return slow.get(peer, slow.get(EVERYONE, 1.0))

    def _note(self) -> None:
        # Plain attributes: some are looked at for every token.
        kinds = {fault.kind for fault in self._active}
        #: Whether a decode worker computes prompts itself and fetches nothing.
        self.recompute = "recompute" in kinds
        #: Whether replies are HTTP 200 without any token.
        self.zero_tokens = "zero_tokens" in kinds
        #: Whether a stream begins at once with an event that has neither text nor tokens.
        self.empty_first_chunk = "empty_first_chunk" in kinds
        #: Whether connections are accepted and nothing is answered.
        self.hanging = "hang" in kinds
        #: Whether tokens can go out without a look at the faults.
        self.quiet = not kinds & {"hang", "die"}

    def _happens(self, kind: str, peer: str) -> bool:
        for fault in self._active:
            if fault.kind == kind and peer != "" and fault.peer in (peer, EVERYONE):
                if fault.left is not None:
                    fault.left -= 1
                    if fault.left == 0:
                        self._active.remove(fault)
                return True
        return False


def _read(body: object) -> Fault:
    if not isinstance(body, dict) or "kind" not in body:
        raise BadFaultError(f'a fault is a JSON object like {{"kind": "corrupt"}}; kinds: {", ".join(KINDS)}')
    kind = body["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise BadFaultError(f"there is no fault {kind!r}; {hint}Kinds: {', '.join(KINDS)}")
    keys = {key.rstrip("!"): key.endswith("!") for key in KINDS[kind]}
    for key in body:
        if key != "kind" and key not in keys:
            raise BadFaultError(f"{kind} has no {key!r}; it takes {', '.join(keys) or 'nothing else'}")
    for key, must in keys.items():
        if must and key not in body:
            raise BadFaultError(f"{kind} needs {key}")
    return Fault(
        kind=kind,
        peer=_peer(body.get("peer")),
        left=_count(body, "after_tokens" if kind == "die" else "count"),
        factor=_factor(body.get("factor", 1)),
    )


def _peer(value: object) -> str:
    if value is None:
        return EVERYONE
    if not isinstance(value, str) or not value:
        raise BadFaultError(f'peer must be an address like "127.0.0.1:8998", or "*" for every peer, not {value!r}')
    return value


def _count(body: dict[str, object], key: str) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadFaultError(f"{key} must be a whole number above 0, not {value!r}; leave it out for no limit")
    return value


def _factor(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise BadFaultError(f"factor must be a number above 0 by which the transfer's time is multiplied, not {value!r}")
    return float(value)
