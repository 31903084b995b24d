"""Conversations, turn by turn: what a user who stays sees as the context grows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pdbench.metrics import e2e_s, input_tokens, output_tokens, request_rate, stats, tpot_s, ttft_s
from pdbench.records import NOT_REPORTED, Record


def by_turn(records: Sequence[Record]) -> list[dict[str, object]] | None:
    """Return ``turns`` of a load point from its measured records, the first turn first; None without conversations.

    ``completed`` and ``failed`` count requests; ``prompt_tokens`` and ``cached_tokens`` are means (None: not reported), and
    so is ``kv_tokens``: prompt + output tokens, which is what the KV cache of the worker that decodes holds of the
    conversation when the turn ends;
    ``ttft_ms``, ``tpot_ms`` are distributions; ``request_output_throughput`` is the mean of output tokens / E2E, tokens/s;
    ``cumulative_latency_ms`` is the distribution of the sum of E2E over a conversation's turns so far, thinking left out,
    over the conversations in which all of them were answered.
    """
    if not any(record.turn for record in records):
        return None
    talks: dict[int, dict[int, Record]] = defaultdict(dict)
    for record in records:
        talks[record.conversation][record.turn] = record
    found: list[dict[str, object]] = []
    for turn in range(1, max(record.turn for record in records) + 1):
        asked = [talk[turn] for talk in talks.values() if turn in talk]
        good = [record for record in asked if record.ok]
        whole = [talk for talk in talks.values() if all(k in talk and talk[k].ok for k in range(1, turn + 1))]
        paces = [pace for record in good if (pace := tpot_s(record)) is not None]
        found.append(
            {
                "turn": turn,
                "completed": len(good),
                "failed": len(asked) - len(good),
                "prompt_tokens": _mean([input_tokens(record) for record in good]),
                "kv_tokens": _mean([input_tokens(record) + output_tokens(record) for record in good]),
                "cached_tokens": _mean([r.cached_tokens for r in good if r.cached_tokens != NOT_REPORTED]),
                "ttft_ms": stats(1000 * ttft_s(record) for record in good),
                "tpot_ms": stats(1000 * pace for pace in paces),
                "request_output_throughput": _mean([rate for record in good if (rate := request_rate(record)) is not None]),
                "cumulative_latency_ms": stats(1000 * sum(e2e_s(talk[k]) for k in range(1, turn + 1)) for talk in whole),
            }
        )
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
