"""What the client recorded against what the server did: error, load delivered, and a grade. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pdbench.metrics import Stats, stats
from pdbench.selfcheck.truth import COLUMNS, answer_text

#: Grade -> most that the mean TTFT, the p99 TTFT and the ITL may be wrong by (ms), and least load delivered. TTFTs that people
#: decide by are 50 ms to some seconds: A is within 2 % of the shortest of them, B within 5 % of an objective of 200 ms, C within
#: 5 % of a second. 0.9 is the load below which `pdbench run` calls itself too slow.
GRADES: dict[str, tuple[float, float, float, float]] = {
    "A": (1.0, 10.0, 0.1, 0.99),
    "B": (10.0, 50.0, 0.5, 0.97),
    "C": (50.0, 200.0, 2.0, 0.90),
}
TOO_SLOW = "F"
#: how long a point lasts at least, where nobody wants it short
_LONG_S = 5.0
#: a figure is called trusted from where the client's own part in it is this small
_PART = 0.1


@dataclass(frozen=True)
class Answer:
    """One measured request as the client recorded it; seconds on the client's clock."""

    ok: bool
    sent_s: float
    first_s: float
    end_s: float
    sha256: str


@dataclass(frozen=True)
class Finding:
    """What came of one concurrency; errors are the client's figure minus the server's, in ms, ``delivered`` a share.

    ``wrong_by`` holds mean, p50 and p99 over requests. ``trusted_from_ms``: the shortest mean and p99 TTFT whose
    error is at most a tenth. ``most_tokens_per_s``: what the client could take in until its busiest sender has no CPU left.
    """

    concurrency: int
    requests: int
    tokens: int
    itl_ms: float
    tokens_per_s: float
    delivered: float
    ttft_wrong_by: Stats
    itl_wrong_by: Stats
    true_ttft_ms: Stats
    true_itl_ms: Stats
    server_late_ms: Stats
    client_cores: float | None
    most_tokens_per_s: float | None
    other_cores: float
    trusted_from_ms: dict[str, float]
    grade: str
    reasons: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """Return the entry of selfcheck.json."""
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """The load of one point: requests in flight, rounds of them, tokens an answer, ms between tokens."""

    concurrency: int
    rounds: int
    tokens: int
    itl_ms: float

    @property
    def requests(self) -> int:
        """Requests in all."""
        return self.concurrency * self.rounds


def shape(concurrency: int, tokens: int, ttft_ms: float, itl_ms: float, most_rate: float, seconds: float | None) -> Asked:
    """Return the load of a point: whole answers, for 5 s and three rounds at least.

    With ``seconds`` it is that long, and answers are cut so that it holds two rounds. Tokens come further apart than asked where
    so many answers at once would need more than ``most_rate`` tokens a second from the server. At least 8 tokens are left
    of an answer, so that there is something to time.
    """
    itl = max(itl_ms, 1000 * concurrency / most_rate)
    if seconds is None:
        least, seconds = 3, _LONG_S
    else:
        least = 2
        tokens = min(tokens, max(8, int((1000 * seconds / least - ttft_ms) / itl)))
    return Asked(concurrency, max(least, int(1000 * seconds / (ttft_ms + tokens * itl))), tokens, itl)


def judge(
    asked: Asked,
    answers: Sequence[Answer],
    log: Sequence[Sequence[int]],
    client: Mapping[str, object],
    path_ms: float = 0.0,
    other_cores: float = 0.0,
) -> Finding:
    """Compare the client's records with the server's log.

    ``client`` is that of summary.json; ``path_ms`` is taken off the TTFT's error: the way there and back is none of the
    client's doing. A record and its row are brought together by the text of the answer, which no other answer has.
    """
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in log]
    by_text = {hashlib.sha256(answer_text(row["number"], row["tokens"]).encode()).hexdigest(): row for row in rows}
    pairs = [(a, by_text[a.sha256]) for a in answers if a.ok and a.sha256 in by_text]
    reasons = []
    if len(answers) < asked.requests:
        reasons.append(f"{len(answers)} of {asked.requests} requests are accounted for")
    if failed := sum(not a.ok for a in answers):
        reasons.append(f"{failed} of {len(answers)} requests failed")
    if odd := sum(a.ok and a.sha256 not in by_text for a in answers):
        reasons.append(f"{odd} of {len(answers)} answers were recorded with another text than was sent")
    true_ttft = [(row["first_ns"] - row["read_ns"]) / 1e6 for _, row in pairs]
    ttft = stats(1000 * (a.first_s - a.sent_s) - path_ms - true for (a, _), true in zip(pairs, true_ttft, strict=True))
    gaps = [(a, row) for a, row in pairs if row["tokens"] > 1]
    true_itl = [(row["last_ns"] - row["first_ns"]) / 1e6 / (row["tokens"] - 1) for _, row in gaps]
    itl = stats(1000 * (a.end_s - a.first_s) / (row["tokens"] - 1) - true for (a, row), true in zip(gaps, true_itl, strict=True))
    span = max((a.end_s for a, _ in pairs), default=0.0) - min((a.sent_s for a, _ in pairs), default=0.0)
    busy = sum(row["last_ns"] - row["read_ns"] for _, row in pairs) / 1e9
    delivered = busy / (asked.concurrency * span) if span > 0 else 0.0
    rate = sum(row["tokens"] for _, row in pairs) / span if span > 0 else 0.0
    cpu = client.get("cpu_s")
    share = client.get("busy")
    cores = float(cpu) / span if isinstance(cpu, (int, float)) and span > 0 else None
    grade = _grade(ttft, itl, delivered) if not reasons else TOO_SLOW
    if grade == TOO_SLOW and not reasons:
        reasons.append(_why(ttft, itl, delivered))
    return Finding(
        concurrency=asked.concurrency,
        requests=asked.requests,
        tokens=asked.tokens,
        itl_ms=asked.itl_ms,
        tokens_per_s=rate,
        delivered=delivered,
        ttft_wrong_by=ttft,
        itl_wrong_by=itl,
        true_ttft_ms=stats(true_ttft),
        true_itl_ms=stats(true_itl),
        server_late_ms=stats(row["late_max_ns"] / 1e6 for _, row in pairs),
        client_cores=cores,
        most_tokens_per_s=rate / share if isinstance(share, (int, float)) and share > 0 else None,
        other_cores=other_cores,
        trusted_from_ms={name: max(0.0, value) / _PART for name in ("mean", "p99") if (value := ttft[name]) is not None},
        grade=grade,
        reasons=reasons,
    )


def _figures(ttft: Stats, itl: Stats, delivered: float) -> tuple[float, float, float, float]:
    mean, p99, gap = (math.inf if value is None else abs(value) for value in (ttft["mean"], ttft["p99"], itl["mean"]))
    return mean, p99, 0.0 if itl["mean"] is None else gap, delivered


def _grade(ttft: Stats, itl: Stats, delivered: float) -> str:
    mean, p99, gap, share = _figures(ttft, itl, delivered)
    for grade, (most_mean, most_p99, most_gap, least) in GRADES.items():
        if mean <= most_mean and p99 <= most_p99 and gap <= most_gap and share >= least:
            return grade
    return TOO_SLOW


def _why(ttft: Stats, itl: Stats, delivered: float) -> str:
    mean, p99, gap, share = _figures(ttft, itl, delivered)
    most_mean, most_p99, most_gap, least = GRADES["C"]
    found = []
    if share < least:
        found.append(f"it delivered {share:.0%} of the load (least: {least:.0%})")
    if mean > most_mean:
        found.append(f"its mean TTFT is wrong by {mean:.1f} ms (most: {most_mean:g})")
    if p99 > most_p99:
        found.append(f"its TTFT is wrong by {p99:.0f} ms at p99 (most: {most_p99:g})")
    if gap > most_gap:
        found.append(f"its ITL is wrong by {gap:.2f} ms (most: {most_gap:g})")
    return "the client did not keep up: " + " and ".join(found)


def worst(grades: Sequence[str]) -> str:
    """Return the worst of some grades; F for none."""
    return max(grades, default=TOO_SLOW)
