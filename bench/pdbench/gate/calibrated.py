"""Check on what the client was found to be wrong by, beside a server of known timing, before the load (`pdbench selfcheck`)."""

from __future__ import annotations

from typing import Any

from pdbench.gate.check import Check
from pdbench.gate.rundata import SELFCHECK, Json, Point, RunData
from pdbench.metrics import output_tokens, stats, tpot_s, ttft_s

ID = "client-calibrated"
#: The client's error may be this share of a mean TTFT, a p99 TTFT or a mean TPOT: two configurations that differ by less are
#: rarely told apart. (Its error in p99 may also be as large as the loop lag that the run was allowed.)
MOST_SHARE = 0.1
#: ... or this, in ms, however short the figure: what a host that is a little busy does to any client.
MOST_TTFT_MS, MOST_ITL_MS = 10.0, 0.5
#: A client that is wrong by more than this share of the mean TTFT, within bounds, is worth a word.
WORTH_A_WORD = 0.05


def calibrated(run: RunData, point: Point) -> Check:
    """Beside a server of known timing, under as many requests, the client was right to a tenth of what it now measured."""
    found = run.selfcheck
    if not found:
        if run.manifest.get("bench_selfcheck") is True:
            message = f"the client was to be calibrated before the load, and {SELFCHECK} is missing (run.log says why)"
            return Check(ID, False, point.index, message, {})
        message = "the client was not calibrated on its host before the load (bench_selfcheck)"
        return Check(ID, True, point.index, message, {"caution": message})
    if found.get("error"):
        return Check(ID, False, point.index, f"the client could not be calibrated: {found['error']}", found)
    try:
        return _judged(run, point, found)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as why:
        message = f"{SELFCHECK} is not as `pdbench selfcheck` writes it: {type(why).__name__} {why}"
        return Check(ID, False, point.index, message, {})


def _judged(run: RunData, point: Point, found: Json) -> Check:
    entry = _nearest(found["points"], point.summary.get("concurrency"))
    flying = int(entry["concurrency"])
    evidence: dict[str, Any] = {
        "selfcheck": entry,
        "bounds": {"share": MOST_SHARE, "ttft_ms": MOST_TTFT_MS, "itl_ms": MOST_ITL_MS},
    }
    if entry["reasons"]:
        message = f"with {flying} requests in flight {'; '.join(entry['reasons'])}"
        return Check(ID, False, point.index, message, evidence)
    ttft, p99, itl = (
        abs(v or 0.0) for v in (*(entry["ttft_wrong_by"][k] for k in ("mean", "p99")), entry["itl_wrong_by"]["mean"])
    )
    first = stats(1000 * ttft_s(r) for r in point.good)
    mean, tail = first["mean"] or 0.0, first["p99"] or 0.0
    per_token = stats(1000 * t for r in point.good if (t := tpot_s(r)) is not None)["mean"] or 0.0
    evidence["measured_ms"] = {"ttft": mean, "ttft_p99": tail, "tpot": per_token}
    faults = [
        f"beside a server of known timing its {what} is wrong by {wrong:.1f} ms (bound {most:.1f}; {seen:.1f} ms were measured)"
        for what, wrong, seen, most in (
            ("mean TTFT", ttft, mean, max(MOST_TTFT_MS, MOST_SHARE * mean)),
            ("p99 TTFT", p99, tail, max(run.bounds.loop_lag_ms, MOST_SHARE * tail)),
            ("ITL", itl, per_token, max(MOST_ITL_MS, MOST_SHARE * per_token)),
        )
        if wrong > most
    ]
    if faults:
        return Check(ID, False, point.index, f"the client is too slow for this: {' and '.join(faults)}", evidence)
    rate, most_rate = _rate(point), entry["most_tokens_per_s"]
    cautions = []
    if ttft > WORTH_A_WORD * mean:
        cautions.append(f"the client's own part in the mean TTFT of {mean:.1f} ms is {ttft:.1f} ms")
    if most_rate and rate > most_rate:
        cautions.append(f"{rate:,.0f} tokens/s came in, and the client was found good for about {most_rate:,.0f}")
    if cautions:
        evidence["caution"] = "; ".join(cautions)
    message = (
        f"grade {entry['grade']}: with {flying} requests in flight the client's TTFT is wrong by {ttft:.1f} ms (p99 {p99:.1f}), "
        f"its ITL by {itl:.2f} ms"
    )
    return Check(ID, True, point.index, message, evidence)


def _nearest(entries: list[Json], concurrency: object) -> Json:
    """Return the entry of the fewest requests in flight that are not fewer than the point's, else that of the most."""
    ordered = sorted(entries, key=lambda entry: int(entry["concurrency"]))
    wanted = concurrency if isinstance(concurrency, int) else 0
    return next((entry for entry in ordered if int(entry["concurrency"]) >= wanted), ordered[-1]) if wanted else ordered[-1]


def _rate(point: Point) -> float:
    """Return the output tokens a second that came in."""
    if not point.good:
        return 0.0
    span = max(r.end_s for r in point.good) - min(r.sent_s for r in point.good)
    return sum(map(output_tokens, point.good)) / span if span > 0 else 0.0
