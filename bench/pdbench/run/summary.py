"""summary.json: the figures of every load point and what the client itself finds wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from pdbench import shapes, steady
from pdbench.attribution import attribute
from pdbench.metrics import Slo, Stats, output_tokens, summarise
from pdbench.records import MEASURE, NOT_REPORTED, Record
from pdbench.turns import by_turn

#: tokens an event up to which it counts as holding one: a character can take two tokens
_ONE_TOKEN = 1.05
#: how a reason begins that the load generator is to blame for
SLOW_CLIENT = "the client did not keep up"
Json = dict[str, object]


@dataclass(frozen=True)
class Bounds:
    """What the client may at most do wrong: p99 of loop lag and of lateness in ms, least share of load delivered."""

    loop_lag_ms: float = 100.0
    lateness_ms: float = 100.0
    delivered: float = 0.9


@dataclass(frozen=True)
class Setup:
    """What a run's figures depend on beside its records; it is kept in run.json, for `--recover`.

    ``verify_outputs``: prompts a pair whose answers are verified before the first point, 0 for none. ``no_gpu``, ``truncated``:
    as the plan says (`pdbench.evidence.Deployment`).
    """

    api: str
    prompt: str
    points: Sequence[Json]
    ratio: str | None
    gpus: int | None
    slo: Slo
    bounds: Bounds
    verify_outputs: int = 0
    no_gpu: str = ""
    truncated: str = ""


def point_summary(
    setup: Setup,
    number: int,
    records: Sequence[Record],
    client: Mapping[str, object],
    evidence: Mapping[str, object] | None = None,
) -> Json:
    """Return one entry of ``points``: what was asked, what came of it, whether to believe it.

    ``evidence`` is the point's entry in evidence.json, where there is one.
    """
    asked = setup.points[number]
    measured = [r for r in records if r.point == number and r.phase == MEASURE]
    reasons = find_faults(setup, asked, measured, client)
    slots = cast("int | None", asked["concurrency"])
    saturation = None if slots is not None else steady.saturation(measured) if _even(asked) else dict(_UNEVEN)
    return {
        "point": number,
        **asked,
        "ratio": setup.ratio,
        "gpus": setup.gpus,
        **summarise(measured, setup.gpus, setup.slo),
        "steady": steady.summarise(measured, slots, setup.gpus),
        "saturation": saturation,
        "turns": by_turn(measured),
        "attribution": attribute(evidence or {}, [r for r in records if r.point == number]),
        "valid": not reasons,
        "invalid_reasons": reasons,
        "notes": [*_failed(measured), *find_notes(client), *_saturated(saturation), *_uncounted(measured, client)],
        "client": dict(client),
    }


#: ``saturation`` of a trace or a ramp: what is in flight grows with the rate, too
_UNEVEN: Json = {"oversaturated": None, "reason": "the rate of sending changes by itself"}


def _even(asked: Json) -> bool:
    return asked.get("request_rate") is not None and asked.get("request_rate_to") is None


def whole_summary(setup: Setup, points: Sequence[Json], missing: Sequence[str], not_run: str = "") -> Json:
    """Return summary.json; with one load point its keys stand at the top level, too.

    ``missing`` are reasons that concern the run as a whole (stopped, recovered); ``not_run`` is why it was right to leave
    the load points after the last one out.
    """
    left = range(len(points), len(setup.points)) if not_run else ()
    many = len(points) > 1
    reasons = [
        *missing,
        *(f"point {p['point']}: {why}" if many else str(why) for p in points for why in cast(list[str], p["invalid_reasons"])),
    ]
    total = {key: sum(cast(int, p[key]) for p in points) for key in ("completed", "failed")}
    single = points[0] if len(points) == 1 else {}
    return {
        "schema": shapes.SCHEMA,
        **single,
        **total,
        "ratio": setup.ratio,
        "gpus": setup.gpus,
        "api": setup.api,
        "prompt": setup.prompt,
        "no_gpu": setup.no_gpu,
        "truncated": setup.truncated,
        "valid": not reasons,
        "invalid_reasons": reasons,
        "points": list(points),
        "not_run": [{"point": number, **setup.points[number], "why": not_run} for number in left],
    }


def find_faults(setup: Setup, asked: Json, measured: Sequence[Record], client: Mapping[str, object]) -> list[str]:
    """Return every reason why the figures of a point are not to be believed, as far as the client can see."""
    good = [r for r in measured if r.ok]
    # Where prompts are to begin alike, a prefix cache rightly answers for some of them.
    cached = [] if asked.get("shared_prefix") else _cached(setup, good)
    return [
        *_missing(cast(int, asked["num_requests"]), measured),
        *_wrong(setup, good),
        *cached,
        *_slow_client(setup.bounds, client),
    ]


def _missing(asked: int, measured: Sequence[Record]) -> list[str]:
    found = []
    if len(measured) != asked:
        found.append(f"{len(measured)} of {asked} requests are accounted for")
    errors = Counter(r.error for r in measured if not r.ok)
    if errors:
        error, times = errors.most_common(1)[0]
        found.append(f"{errors.total()} of {len(measured)} requests failed, {times} of them with: {error}")
    return found


def _wrong(setup: Setup, good: Sequence[Record]) -> list[str]:
    found = []
    silent = sum(r.output_tokens == NOT_REPORTED for r in good)
    if silent:
        found.append(f"the server reported no count of output tokens for {silent} of {len(good)} answers")
    short = [r for r in good if r.output_tokens not in (NOT_REPORTED, r.output_tokens_asked)]
    if short:
        r = short[0]
        found.append(
            f"{len(short)} of {len(good)} answers are not as long as forced, "
            f"such as request {r.index}: {r.output_tokens} tokens for {r.output_tokens_asked}"
        )
    if setup.prompt == "tokens":
        other = [r for r in good if r.prompt_tokens not in (NOT_REPORTED, r.prompt_tokens_asked)]
        if other:
            r = other[0]
            found.append(
                f"the server counts another number of prompt tokens than were sent in {len(other)} of {len(good)} "
                f"requests, such as request {r.index}: {r.prompt_tokens} for {r.prompt_tokens_asked}"
            )
    unordered = sum(not r.sent_s < r.first_s <= r.end_s or r.chunk_s != sorted(r.chunk_s) for r in good)
    if unordered:
        found.append(f"{unordered} of {len(good)} requests have times out of order (first token not after sending)")
    return found


def _cached(setup: Setup, good: Sequence[Record]) -> list[str]:
    # Every chat begins with the template's own words: there a cache may help whatever the prompts are.
    if setup.api == "chat":
        return []
    cached = sum(max(0, r.cached_tokens) for r in good)
    prompts = sum(max(0, r.prompt_tokens) for r in good)
    # A BOS token and a first token met before are no contamination.
    if cached > max(0.01 * prompts, 2 * len(good)):
        return [
            f"{cached} of {prompts} prompt tokens came out of a prefix cache: "
            "these prompts were sent before; take another --seed or flush the caches"
        ]
    return []


def _slow_client(bounds: Bounds, client: Mapping[str, object]) -> list[str]:
    found = []
    for key, limit, what in (
        ("loop_lag_ms", bounds.loop_lag_ms, "reading lagged behind what arrived"),
        ("send_lateness_ms", bounds.lateness_ms, "requests were sent late"),
    ):
        p99 = cast(Stats, client[key])["p99"]
        if p99 is not None and p99 > limit:
            found.append(f"{SLOW_CLIENT}: its {what} by {p99:.0f} ms (p99; bound {limit:g} ms)")
    delivered = cast("float | None", client["delivered_load"])
    if delivered is not None and delivered < bounds.delivered:
        found.append(f"{SLOW_CLIENT}: it delivered {delivered:.0%} of the configured load (bound {bounds.delivered:.0%})")
    return found


def find_notes(client: Mapping[str, object]) -> list[str]:
    """Return what a reader of the latencies must know, though nothing is wrong."""
    notes = []
    per_event = cast("float | None", client["tokens_per_event"])
    per_read = cast("float | None", client["events_per_read"])
    if per_event is not None and per_event > _ONE_TOKEN:
        notes.append(
            f"one event holds {per_event:.1f} output tokens on average (tokens per event > 1): "
            "itl_ms is the gap between events, itl_token_ms that between tokens"
        )
    if per_read is not None and per_read > 1.2:
        notes.append(f"one read holds {per_read:.1f} events on average: they came together, and ITL has gaps of 0 in it")
    return notes


def _failed(measured: Sequence[Record]) -> list[str]:
    failed = sum(not r.ok for r in measured)
    return [f"{failed} failed request{' is' if failed == 1 else 's are'} in no percentile"] if failed else []


def _saturated(saturation: Json | None) -> list[str]:
    if not saturation or not saturation["oversaturated"]:
        return []
    growth, rate = (cast(float, saturation[key]) for key in ("backlog_growth", "sent_rate"))
    return [
        f"over-saturated: of {rate:.3g} requests sent each second, {growth:.2g} were left over, "
        "so latencies depend on how long it ran and say nothing of the servers; throughput is the most they give"
    ]


def _uncounted(measured: Sequence[Record], client: Mapping[str, object]) -> list[str]:
    # With one token an event there is nothing to spread.
    if (cast("float | None", client["tokens_per_event"]) or 0) <= _ONE_TOKEN:
        return []
    silent = sum(r.ok and len(r.chunk_tokens) != len(r.chunk_s) for r in measured)
    if not silent:
        return []
    return [f"of {silent} answers the server counted no tokens by event: itl_token_ms takes them as spread evenly over events"]


def output_of(records: Sequence[Record], number: int) -> tuple[int, int]:
    """Return output tokens and events that carried output, summed over the good measured requests of a point."""
    good = [r for r in records if r.point == number and r.phase == MEASURE and r.ok]
    return sum(map(output_tokens, good)), sum(len(r.chunk_s) for r in good)
