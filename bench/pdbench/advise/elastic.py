"""A deployment whose ratio changes while it serves, in virtual time, with what a change costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdbench.advise.layout import Spot, rates_of
from pdbench.advise.simulate import Watch
from pdbench.model.cluster import Deployment, Outcome, Prompt, Role, Simulation
from pdbench.model.profile import Profile
from pdbench.model.scheduler import Worker
from pdbench.sweep import checkout as checkout  # pdlib comes from there
from pdlib.autoscale import Controller, Figures, Move, Observed, parted

#: the driver looks this often whether a worker has drained, in s
LOOK_S = 1.0
_OTHER: dict[Role, Move] = {"prefill": "decode", "decode": "prefill"}


class Policy(Protocol):
    """Decides; is asked every `every_s` seconds."""

    every_s: float

    def decide(self, now: float, observed: Observed) -> Move | None:
        """Return the role that should get a worker now, or None."""

    def done(self, now: float) -> None:
        """Hear that a change is done."""


class Fixed:
    """Never changes anything."""

    every_s = float("inf")

    def decide(self, now: float, observed: Observed) -> Move | None:
        """Stay."""
        return None

    def done(self, now: float) -> None:
        """Never called."""


class Queueing(Controller):
    """The rule of `pdlib.autoscale`, asked every ten seconds."""

    every_s = 10.0


@dataclass
class Schedule:
    """Knows what is best: (from when, prefill workers), ascending. ``lead_s``: how long before its time a change begins."""

    plan: Sequence[tuple[float, int]]
    lead_s: float
    every_s: float = 5.0
    #: prefill workers once all that is under way is done; -1: as many as there are
    coming: int = field(default=-1)

    def decide(self, now: float, observed: Observed) -> Move | None:
        """Return the next step towards the ratio that is best when the step is done."""
        if self.coming < 0:
            self.coming = observed.prefill
        due = [prefill for begin, prefill in self.plan if begin <= now + self.lead_s]
        gap = (due[-1] if due else self.plan[0][1]) - self.coming
        if gap > 0 and observed.decode > 1:
            self.coming += 1
            return "prefill"
        if gap < 0 and observed.prefill > 1:
            self.coming -= 1
            return "decode"
        return None

    def done(self, now: float) -> None:
        """Nothing to do: it has counted the worker already."""


class Elastic(Simulation):
    """Like workers of one profile; a worker that changes role is drained, restarted (`startup_s` of the profile), and joins."""

    def __init__(self, profile: Profile, prefill: int, decode: int, policy: Policy, way: str = "cuda_ipc", gpus: int = 1) -> None:
        """Begin with a ratio; ``gpus`` of each worker; ``way``: how KV travels."""
        self._rates, self._limits = rates_of(Spot(profile.name, gpus), {profile.name: profile}, {})
        made = Deployment([self._worker() for _ in range(prefill)], [self._worker() for _ in range(decode)], [], lambda a, b: way)
        super().__init__(made, every_token=False)
        self.policy, self._restart_s = policy, profile.engine.startup_s
        self._deployment = made
        self._watches = {id(w): Watch(w) for w in (*made.prefill, *made.decode)}
        self._before: dict[str, float] = {}
        self._left = 0
        #: (when it was decided, prefill and decode workers once it is done, how long it took in s)
        self.changes: list[tuple[float, int, int, float]] = []

    def _worker(self) -> Worker:
        return Worker(self._rates, self._limits)

    def open_loop(self, prompts: Sequence[Prompt]) -> list[Outcome]:
        """Send every prompt when it is due, and ask the policy until all are served."""
        self._left = len(prompts)
        self._on_done = self._count
        if self.policy.every_s < float("inf"):
            self.at(self.policy.every_s, self._look)
        return super().open_loop(prompts)

    def _count(self, now: float) -> None:
        self._left -= 1

    def _look(self, now: float) -> None:
        if not self._left:
            return
        move = self.policy.decide(now, self._observe(self.policy.every_s))
        if move is not None:
            self._change(now, move)
        self.at(now + self.policy.every_s, self._look)

    def _change(self, begun: float, to: Move) -> None:
        source: Role = _OTHER[to]
        # The last that came is the one whose place the router's others know least.
        leaving = self.close(source, self.serving(source)[-1])

        def drained(now: float) -> None:
            if not leaving.idle:
                self.at(now + LOOK_S, drained)
                return
            self.leave(leaving)
            self.at(now + self._restart_s, restarted)

        def restarted(now: float) -> None:
            worker = self._worker()
            self._watches[id(worker)] = Watch(worker)
            self.join(to, worker)
            self.changes.append((begun, len(self.serving("prefill")), len(self.serving("decode")), now - begun))
            self.policy.done(now)

        drained(begun)

    def _observe(self, window: float) -> Observed:
        """Return what the workers that take requests say of the last window (those that left are forgotten)."""
        computing = [self._deployment.prefill[place] for place in self.serving("prefill")]
        decoding = [self._deployment.decode[place] for place in self.serving("decode")]
        started, waited = (
            self._since("prefill_waiting", computing, lambda w: w.requests),
            self._waits(computing, "prefill_waiting"),
        )
        steps = self._since("steps", decoding, lambda w: w.steps)
        decode_s = self._since("decode", decoding, lambda w: w.decode)
        front = self._since("front", decoding, lambda w: w.front_end)
        joined = self._since("joined", decoding, lambda w: w.requests)
        queue = sum(worker.states["waiting"] for worker in computing)
        running, held = (sum(worker.states[state] for worker in decoding) for state in ("running", "transfer"))
        prealloc = sum(worker.states["prealloc"] for worker in decoding)
        memory, behind = parted(prealloc / max(joined, 1.0) * window, running, held)
        full = [_full(worker) for worker in decoding]
        return Observed(
            prefill=len(computing),
            decode=len(decoding),
            # Little's law for those that still wait, and the waits of those that went on
            prefill_wait_s=max(waited / started if started else 0.0, queue / max(started, 1.0) * window) + behind,
            decode_wait_s=memory,
            itl_s=decode_s / steps if steps else 0.0,
            decode_full=max([*full, front / window / len(decoding)]),
        )

    def _waits(self, workers: Sequence[Worker], stage: str) -> float:
        return self._since(f"wait {stage}", workers, lambda w: w.waits[stage])

    def _since(self, name: str, workers: Sequence[Worker], value: Callable[[Watch], float]) -> float:
        """Return how much a count of the workers has grown since the last look."""
        grown = 0.0
        for worker in workers:
            key, now = f"{name} {id(worker)}", value(self._watches[id(worker)])
            grown += now - self._before.get(key, 0.0)
            self._before[key] = now
        return grown


def _full(worker: Worker) -> float:
    """Return how full of decoding a worker is, as the live rule reads it."""
    states, limits = worker.states, worker.limits
    said = Figures(0, 0, 0, 0, 0, 0, states["transfer"], states["running"], worker.used / limits.capacity, limits.max_running)
    return said.full
