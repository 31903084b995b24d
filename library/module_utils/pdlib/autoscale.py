"""When to change the ratio while serving: a pure rule on what workers say of their queues.

Whoever drives it measures an `Observed` every few seconds, carries out what the `Controller` says, and tells it when that is
done: `pdbench autoscale` from workers' metrics (`read`, `observed`), the study of docs/results/dynamic-ratio.md in simulation.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Literal, Mapping, Optional, Sequence, Tuple

from .errors import UserError
from .ratio import Ratio

Json = Dict[str, Any]
#: which role gets a worker that the other one gives
Move = Literal["prefill", "decode"]
_SAMPLE = re.compile(r"^([a-z_]+:[a-zA-Z0-9_]+)(?:\{([^}]*)\})? ([0-9.eE+-]+)$", re.M)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
#: how many workers of the other role leave for a role to get some, where one makes room for one
ONE: Mapping[Move, int] = {"prefill": 1, "decode": 1}


@dataclass(frozen=True)
class Observed:
    """One window. ``prefill``, ``decode``: workers that take requests.

    ``prefill_wait_s``: how long prompts wait for prefill; ``decode_wait_s``: for memory or a place on a decode worker, as far as
    those that decode hold it (:func:`parted`); ``itl_s``: mean gap between tokens; ``decode_full``: the share that those hold of
    what decode workers have at most (KV memory, running requests, front-end process), the fullest counts.
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
    wanted: Optional[Move] = None
    seen: int = 0
    changed_at: float = field(default=-float("inf"))
    changing: bool = False

    def decide(self, now: float, observed: Observed, leave: Mapping[Move, int] = ONE) -> Optional[Move]:
        """Return which role should get a worker now, or None. After a move it waits for `done`; ``leave``: as of `wish`."""
        wanted = wish(self.rule, observed, leave)
        self.seen = self.seen + 1 if wanted == self.wanted else 1
        self.wanted = wanted
        if wanted is None or self.changing or self.seen < self.rule.patience or now - self.changed_at < self.rule.rest_s:
            return None
        self.changing, self.seen = True, 0
        return wanted

    def done(self, now: float) -> None:
        """Hear that the worker serves in its new role (or that the change failed)."""
        self.changing, self.changed_at = False, now

    def forget(self) -> None:
        """Begin to count anew: a window is missing, so that the next one is in a row with none."""
        self.wanted, self.seen = None, 0


def pressures(rule: Rule, observed: Observed) -> Tuple[float, float]:
    """Return the pressure on prefill and on decode; 1: the promise is just kept."""
    prefill = observed.prefill_wait_s / rule.ttft_s
    decode = max(observed.itl_s / rule.itl_s, observed.decode_wait_s / rule.ttft_s, observed.decode_full / rule.full)
    return prefill, decode


def wish(rule: Rule, observed: Observed, leave: Mapping[Move, int] = ONE) -> Optional[Move]:
    """Return which role should get a worker of the other, by this window alone; None when neither should.

    ``leave``: by the role that gets some, how many workers of the other leave for it (:func:`step`). What the other would have
    without them: the same load on fewer. Decode's pressure grows by n / (n - k), its latency by less, as steps have a fixed
    part: so it errs towards staying. A queue in front of prefill has no such law: to give a worker, it must be all but empty.
    What a role has then is below what would make it wish for the worker back.
    """
    prefill, decode = pressures(rule, observed)
    if prefill > rule.high and _without(decode, observed.decode, leave["prefill"]) < rule.low:
        return "prefill"
    if decode > 1.0 and _without(prefill, observed.prefill, leave["decode"]) < rule.low * rule.high:
        return "decode"
    return None


def _without(pressure: float, workers: int, leave: int) -> float:
    return pressure * workers / (workers - leave) if workers > leave else math.inf


# -- from metrics pages to what the rule takes


@dataclass(frozen=True)
class Figures:
    """What a worker says at one moment.

    Counters since its start: ``queued`` requests that waited ``queue_s`` in all before their first forward pass (prefill) or
    batch (decode); SGLang counts the token by which a worker with nothing to do answers ``/health``, too. ``gaps`` between tokens that took ``gap_s`` in all, ``answers`` whose time per output token adds up to
    ``answer_s``: who does not stream has no gaps. Gauges, in requests: ``waiting`` for that, or for memory
    of the KV cache (``prealloc``), ``held``: have memory, and their prompt is not there yet, ``running``; ``usage``: the share of
    that memory that is taken; ``most``: requests that run at most, 0 where that is not known.
    """

    queue_s: float
    queued: float
    gap_s: float
    gaps: float
    waiting: float
    prealloc: float
    held: float
    running: float
    usage: float
    most: float = 0.0
    answer_s: float = 0.0
    answers: float = 0.0

    @property
    def decoding(self) -> float:
        """Return the share of those who hold memory that decode: the others wait for prefill."""
        return self.running / (self.running + self.held) if self.held else 1.0

    @property
    def full(self) -> float:
        """Return how full of decoding it is, 0 to 1."""
        return max(self.usage * self.decoding, self.running / self.most if self.most else 0.0)


#: by figure the samples that hold it, the first that is shown counts; SGLang 0.5.23 srt/observability/metrics_collector.py, vLLM
#: 0.33 vllm/v1/metrics/loggers.py
_COUNTERS: Mapping[str, Sequence[str]] = {
    "queue_s": ("sglang:queue_time_seconds_sum", "vllm:request_queue_time_seconds_sum"),
    "queued": ("sglang:queue_time_seconds_count", "vllm:request_queue_time_seconds_count"),
    "gap_s": ("sglang:inter_token_latency_seconds_sum", "vllm:inter_token_latency_seconds_sum"),
    "gaps": ("sglang:inter_token_latency_seconds_count", "vllm:inter_token_latency_seconds_count"),
    "answer_s": ("sglang:request_time_per_output_token_seconds_sum", "vllm:request_time_per_output_token_seconds_sum"),
    "answers": ("sglang:request_time_per_output_token_seconds_count", "vllm:request_time_per_output_token_seconds_count"),
}
#: vLLM's gauges; SGLang's stand still while a worker computes nothing (Scheduler.on_idle), so its /v1/loads is asked instead
_WAITING, _RUNNING, _USAGE = "vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"


def read(page: str, loads: Optional[str] = None) -> Optional[Figures]:
    """Return what a worker says: its metrics page, and its ``/v1/loads?include=core,disagg`` (None: the engine has none).

    Sums over data-parallel ranks; of usage, the fullest. None for pages that say nothing of it. Without ``/v1/loads`` (vLLM) it
    is not told who waits for memory, or for a KV cache on its way: all that wait are taken to.
    """
    samples = _samples(page)
    given = {figure: next((samples[name] for name in names if name in samples), 0.0) for figure, names in _COUNTERS.items()}
    if loads is None:
        if _RUNNING not in samples:
            return None
        waiting = samples.get(_WAITING, 0.0)
        return Figures(
            **given, waiting=waiting, prealloc=waiting, held=0.0, running=samples[_RUNNING], usage=samples.get(_USAGE, 0.0)
        )
    gauges = _gauges(loads)
    return Figures(**given, **gauges) if gauges is not None else None


def _samples(page: str) -> Dict[str, float]:
    """Return the samples of a page by name, each once.

    Under one name there are ranks of data parallelism, which add up, other ranks of which each says the same, and shares of a
    total by priority.
    """
    found: Dict[str, Dict[str, float]] = {}
    for name, labels, text in _SAMPLE.findall(page):
        own = dict(_LABEL.findall(labels))
        try:
            value = float(text)
        except ValueError:
            continue
        if own.get("priority") or not math.isfinite(value):
            continue
        # What the front end counts has no rank: its label sets are parts of a whole.
        of = own.get("dp_rank", "") if "tp_rank" in own else labels
        ranks = found.setdefault(name, {})
        ranks[of] = max(value, ranks.get(of, value))
    return {name: max(ranks.values()) if name == _USAGE else sum(ranks.values()) for name, ranks in found.items()}


def _gauges(loads: str) -> Optional[Dict[str, float]]:
    found = dict.fromkeys(("waiting", "prealloc", "held", "running", "usage", "most"), 0.0)
    try:
        for load in json.loads(loads)["loads"]:
            disagg = load.get("disaggregation") or {}
            prealloc, held = (float(disagg.get(f"decode_{queue}_queue_reqs") or 0) for queue in ("prealloc", "transfer"))
            elsewhere = prealloc + held + float(disagg.get("prefill_bootstrap_queue_reqs") or 0)
            # num_waiting_reqs are all that are here and do not run.
            found["waiting"] += max(0.0, float(load["num_waiting_reqs"]) - elsewhere)
            found["prealloc"] += prealloc
            found["held"] += held
            found["running"] += float(load["num_running_reqs"])
            found["most"] += float(load.get("max_running_requests") or 0)
            found["usage"] = max(found["usage"], float(load.get("token_usage") or 0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return found if all(math.isfinite(value) for value in found.values()) else None


def observed(before: Mapping[str, Figures], after: Mapping[str, Figures], roles: Mapping[str, str], window_s: float) -> Observed:
    """Return a window of ``window_s`` seconds between two looks at the workers (by name; ``roles``: their role).

    A counter that fell is that of a process which began anew in the window: all that it counts is of the window. Waits follow
    from requests that went on in it (their mean), and by Little's law from those that wait at both its ends (one that just came
    is no queue): the larger of the two. Who waits for memory that others hold who wait for prefill, waits for prefill.
    """
    grown = {name: _grown(before.get(name), after[name]) for name in roles}
    prefill, decode = ([name for name, role in roles.items() if role == wanted] for wanted in ("prefill", "decode"))

    def total(names: Sequence[str], figure: str) -> float:
        return sum(grown[name][figure] for name in names)

    started, joined = total(prefill, "queued"), total(decode, "queued")
    pace, of = ("gap_s", "gaps") if total(decode, "gaps") else ("answer_s", "answers")
    still = sum(min(after[name].waiting, before[name].waiting) for name in prefill if name in before)
    behind_memory = sum(min(after[name].prealloc, before[name].prealloc) for name in decode if name in before)
    wait = behind_memory / max(joined, 1.0) * window_s
    memory, behind = parted(wait, sum(after[name].running for name in decode), sum(after[name].held for name in decode))
    return Observed(
        prefill=len(prefill),
        decode=len(decode),
        prefill_wait_s=max(total(prefill, "queue_s") / started if started else 0.0, still / max(started, 1.0) * window_s)
        + behind,
        decode_wait_s=memory,
        itl_s=total(decode, pace) / total(decode, of) if total(decode, of) else 0.0,
        decode_full=max((after[name].full for name in decode), default=0.0),
    )


def parted(wait_s: float, running: float, held: float) -> Tuple[float, float]:
    """Return a wait for memory in two parts: for those who decode, and for those who hold memory while they wait for prefill."""
    share = running / (running + held) if held else 1.0
    return wait_s * share, wait_s * (1 - share)


def _grown(before: Optional[Figures], after: Figures) -> Dict[str, float]:
    own = asdict(after)
    since = asdict(before) if before and before.queued <= after.queued and before.gaps <= after.gaps else dict.fromkeys(own, 0.0)
    return {figure: own[figure] - since[figure] for figure in ("queue_s", "queued", "gap_s", "gaps", "answer_s", "answers")}


# -- from a decision to a ratio


def slim(plan: Mapping[str, Any]) -> Json:
    """Return of a deployed plan what a decision takes, {} of none."""
    if not plan.get("workers"):
        return {}
    workers = [
        {**{name: worker[name] for name in ("name", "role", "url")}, "gpus": sum(len(rank["gpus"]) for rank in worker["ranks"])}
        for worker in plan["workers"]
    ]
    router = {name: plan["router"].get(name) for name in ("name", "membership")}
    return {"ratio": plan["ratio"], "workers": workers, "router": router}


def check(plan: Mapping[str, Any]) -> None:
    """Raise UserError for a deployment (:func:`slim`) whose ratio nothing changes while it serves."""
    if not plan.get("workers"):
        raise UserError("nothing is deployed: ansible-playbook deploy_pd.yml -e ratio=1p1d, and then the same command")
    if _counts(plan)["aggregated"]:
        raise UserError(
            f"{plan['ratio']} runs, and autoscale moves workers between prefill and decode: deploy_pd.yml -e ratio=NpMd"
        )
    if plan["router"]["membership"] != "workers":
        raise UserError(f"router={plan['router']['name']} learns its workers only at its start: no ratio is changed behind it")


def _counts(plan: Mapping[str, Any]) -> Dict[str, int]:
    return {role: sum(worker["role"] == role for worker in plan["workers"]) for role in ("prefill", "decode", "aggregated")}


def _gpus(plan: Mapping[str, Any]) -> Dict[str, int]:
    return {worker["role"]: max(1, int(worker["gpus"])) for worker in plan["workers"]}


def step(plan: Mapping[str, Any]) -> Dict[Move, int]:
    """Return how many workers leave their role for the other one to get at least one, by the role that gets it."""
    gpus = _gpus(plan)
    return {"prefill": -(-gpus["prefill"] // gpus["decode"]), "decode": -(-gpus["decode"] // gpus["prefill"])}


def next_ratio(plan: Mapping[str, Any], move: Move) -> Optional[str]:
    """Return the ratio after a move: as few workers as make room for at least one of the other role; None when none would be left.

    Workers of the two roles may have other numbers of GPUs.
    """
    counts = _counts(plan)
    gpus = _gpus(plan)
    source: Move = "decode" if move == "prefill" else "prefill"
    counts[source] -= step(plan)[move]
    counts[move] += max(1, gpus[source] // gpus[move])
    return str(Ratio(**counts)) if counts[source] > 0 else None


# -- in words


def words(rule: Rule, seen: Observed) -> str:
    """Return a window in words: ``prefill waits 0.31 s (0.62 of its limit), decode 41 ms a token, 93 % full (1.03)``."""
    prefill, decode = pressures(rule, seen)
    memory = f", {seen.decode_wait_s:.2f} s for memory" if seen.decode_wait_s else ""
    return (
        f"prefill waits {seen.prefill_wait_s:.2f} s ({prefill:.2f} of its limit), decode {seen.itl_s * 1000:.0f} ms a token{memory}, "
        f"{seen.decode_full * 100:.0f} % full ({decode:.2f})"
    )
