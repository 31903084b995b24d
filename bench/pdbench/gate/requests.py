"""Checks on what the client recorded of every request."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from pdbench.gate.check import Check, some
from pdbench.gate.counters import moved
from pdbench.gate.rundata import Point, RunData
from pdbench.metrics import output_tokens
from pdbench.records import NOT_REPORTED, Record

#: Seconds by which a request may be sent before its scheduled time: uvloop's timers count whole milliseconds.
EARLY_S = 0.001
#: Prompt tokens that unrelated prompts may share by chance (or as a begin-of-text token) in a cache with a page of one.
CHANCE_PREFIX_TOKENS = 2


def accounted(run: RunData, point: Point) -> Check:
    """Every request of the point has exactly one record, and summary.json counts the same ones."""
    counts = Counter(record.index for record in point.records)
    wanted = point.asked
    found = len(point.records)
    twice = sorted(index for index, count in counts.items() if count > 1)
    evidence = {"asked": wanted, "recorded": found, "recorded_twice": twice[:20]}
    if wanted is None:
        message = f"{found} requests are recorded, and the run does not say how many it asked for"
        return Check("requests-accounted", False, point.index, message, evidence)
    missing = sorted(set(range(wanted)) - set(counts))
    foreign = sorted(set(counts) - set(range(wanted)))
    evidence |= {"missing": missing[:20], "unknown": foreign[:20]}
    faults = [f"no record of {len(missing)} of {wanted} (index {some(missing)})"] if missing else []
    faults += [f"more than one record of index {some(twice)}"] if twice else []
    faults += [f"records of requests that were never asked for (index {some(foreign)})"] if foreign else []
    said = (point.summary.get("completed"), point.summary.get("failed"))
    counted = (len(point.good), found - len(point.good))
    evidence |= {"completed": counted[0], "failed": counted[1]}
    if not faults and said != counted:
        faults = [f"summary.json counts {said[0]} completed and {said[1]} failed, the records {counted[0]} and {counted[1]}"]
    message = "; ".join(faults) or f"all {wanted} requests have exactly one record"
    return Check("requests-accounted", not faults, point.index, message, evidence)


def errors(run: RunData, point: Point) -> Check:
    """The share of failed requests is within bench_max_error_rate."""
    failed = [r for r in point.records if not r.ok]
    total = len(point.records)
    share = len(failed) / total if total else 0.0
    kinds = Counter(r.error or "no reason recorded" for r in failed).most_common(5)
    evidence = {"failed": len(failed), "total": total, "share": share, "allowed": run.max_error_rate, "errors": dict(kinds)}
    message = f"{len(failed)} of {total} requests failed ({share:.2%}; allowed: {run.max_error_rate:.2%})"
    if kinds:
        message += f": {some((f'{count} x {text[:200]}' for text, count in kinds), 3)}"
    return Check("error-rate", share <= run.max_error_rate, point.index, message, evidence)


def tokens(run: RunData, point: Point) -> Check:
    """Every successful request brought as many output tokens as were forced."""
    if point.summary.get("forced_output") is False:
        return Check("output-tokens", True, point.index, "output lengths were not forced: nothing to hold them to", {})
    silent = [r.index for r in point.good if r.output_tokens == NOT_REPORTED and not r.chunk_tokens]
    wrong = [(r.index, _delivered(r), r.output_tokens_asked) for r in point.good if r.index not in set(silent)]
    wrong = [row for row in wrong if row[1] != row[2]]
    evidence = {
        "asked": sum(r.output_tokens_asked for r in point.good),
        "delivered": sum(output_tokens(r) for r in point.good),
        "not_reported": len(silent),
        "wrong": [{"index": i, "delivered": got, "asked": asked} for i, got, asked in wrong[:20]],
    }
    faults = []
    if wrong:
        named = some((f"request {i}: {got} of {asked}" for i, got, asked in wrong), 3)
        faults.append(f"{len(wrong)} answers do not have the length that was forced ({named})")
    if silent:
        faults.append(f"the server reported no token count for {len(silent)} answers, so their length is not known")
    message = "; ".join(faults) or f"{evidence['delivered']} output tokens, as many as asked for"
    return Check("output-tokens", not faults, point.index, message, evidence)


def _delivered(record: Record) -> int:
    return record.output_tokens if record.output_tokens != NOT_REPORTED else sum(record.chunk_tokens)


def prompts(run: RunData, point: Point) -> Check:
    """The server counts as many prompt tokens as were sent, where prompts are sent as token ids."""
    if run.summary.get("prompt") != "tokens":
        return Check("prompt-tokens", True, point.index, "prompts were sent as text: their length in tokens is approximate", {})
    reported = [r for r in point.good if r.prompt_tokens != NOT_REPORTED]
    wrong = [r for r in reported if r.prompt_tokens != r.prompt_tokens_asked]
    evidence = {
        "reported": len(reported),
        "of": len(point.good),
        "wrong": [{"index": r.index, "counted": r.prompt_tokens, "sent": r.prompt_tokens_asked} for r in wrong[:20]],
    }
    named = some((f"request {r.index}: {r.prompt_tokens} for {r.prompt_tokens_asked}" for r in wrong), 3)
    message = (
        f"the server counted another number of prompt tokens than were sent in {len(wrong)} requests ({named})"
        if wrong
        else f"prompt tokens as sent in all {len(reported)} answers that report them"
    )
    return Check("prompt-tokens", not wrong, point.index, message, evidence)


def substance(run: RunData, point: Point) -> Check:
    """No request counts as a success without HTTP 200 and at least one output token."""
    empty = [r.index for r in point.good if r.output_tokens == 0 or not r.chunk_s or r.status != 200]
    message = (
        f"{len(empty)} requests count as successes without output (index {some(empty)})"
        if empty
        else "every success has HTTP 200 and output"
    )
    return Check("no-empty-success", not empty, point.index, message, {"empty": empty[:20], "successes": len(point.good)})


def disorder(record: Record) -> str:
    """Return what is wrong with a record's times, "" when nothing is; only times that exist are looked at."""
    if record.ok and any(t != t for t in (record.scheduled_s, record.sent_s, record.first_s, record.end_s)):
        return "a success without all of its times"
    if record.sent_s < record.scheduled_s - EARLY_S:
        return "sent before it was due"
    if record.first_s <= record.sent_s:
        return f"TTFT is {1000 * (record.first_s - record.sent_s):.3f} ms"
    if record.end_s < record.first_s:
        return "ends before its first token"
    if any(later < earlier for earlier, later in pairwise(record.chunk_s)):
        return "tokens out of order"
    if record.chunk_s and (record.chunk_s[0] < record.first_s or record.chunk_s[-1] > record.end_s):
        return "tokens outside of its first and last"
    return ""


def timing(run: RunData, point: Point) -> Check:
    """TTFT is above 0, and times are in order: due, sent, first token, every token, end."""
    faults = [(r.index, disorder(r)) for r in point.records]
    faults = [row for row in faults if row[1]]
    message = (
        f"{len(faults)} requests have impossible times: {some((f'request {i}: {what}' for i, what in faults), 3)}"
        if faults
        else "every TTFT is above 0 and all times are in order"
    )
    evidence = {"faults": [{"index": i, "fault": what} for i, what in faults[:20]], "count": len(faults)}
    return Check("timing", not faults, point.index, message, evidence)


def prefix_cache(run: RunData, point: Point) -> Check:
    """The caches were emptied before the point, and no prompt was answered from one.

    A request may hit on what the server itself puts before every prompt (begin-of-text token, chat template: at most the
    prompt tokens reported beyond those asked for) and on CHANCE_PREFIX_TOKENS more. Where the workload declares shared
    prefixes, hits are its own.
    """
    reported = [r for r in point.good if r.cached_tokens != NOT_REPORTED]
    hits = [r for r in reported if r.cached_tokens > _allowed_prefix(r)]
    cached, prompt = sum(r.cached_tokens for r in reported), sum(max(r.prompt_tokens, 0) for r in reported)
    # Of many prompts some begin with the same token by chance; no more is granted to their sum than one token each.
    allowed = sum(_allowed_prefix(r) - CHANCE_PREFIX_TOKENS + 1 for r in point.answers)
    counted = _counted_hits(run, point)
    emptied = {worker["name"]: point.reset_of(worker["name"]).get("flush") for worker in run.workers}
    evidence = {
        "reported": len(reported),
        "of": len(point.good),
        "contaminated": len(hits),
        "cached_tokens": cached,
        "prompt_tokens": prompt,
        "counted_by_engines": counted,
        "index": [r.index for r in hits[:20]],
        "emptied": emptied,
    }
    full = {name: why or "it was not asked" for name, why in emptied.items() if why != "ok"} if run.engine.flush else {}
    faults = [f"{name} did not confirm that its cache is empty ({why})" for name, why in full.items()]
    if point.summary.get("shared_prefix"):
        message = some(faults, 2) or "the caches were empty before the point, and the workload declares shared prefixes"
        return Check("prefix-cache", not faults, point.index, message, evidence)
    if hits:
        worst = max(hits, key=lambda r: r.cached_tokens)
        faults.append(
            f"{len(hits)} prompts were answered from the prefix cache ({cached} tokens, {cached / max(1, prompt):.1%} of all; "
            f"request {worst.index}: {worst.cached_tokens} of {worst.prompt_tokens}): somebody sent them before"
        )
    elif counted > allowed:
        faults.append(f"the engines took {counted:g} prompt tokens from their prefix caches, at most {allowed} may be")
    message = some(faults, 3) or f"no prompt was answered from the prefix cache ({cached} cached tokens in all)"
    if not faults and len(reported) < len(point.good):
        silent = len(point.good) - len(reported)
        message = f"cached tokens are not reported for {silent} of {len(point.good)} answers; the others hit no cache"
    return Check("prefix-cache", not faults, point.index, message, evidence)


def _counted_hits(run: RunData, point: Point) -> float:
    """Cached tokens by the engines' own count; a decode worker repeats what its prefill worker told it."""
    computing = [worker["name"] for worker in run.workers if worker["role"] != "decode"]
    return sum(moved(point.evidence, name, (run.engine.cached_tokens,)).amount or 0.0 for name in computing)


def _allowed_prefix(record: Record) -> int:
    added = max(0, record.prompt_tokens - record.prompt_tokens_asked) if record.prompt_tokens != NOT_REPORTED else 0
    return added + CHANCE_PREFIX_TOKENS
