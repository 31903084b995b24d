"""A peer's figures beside ours, row by row, with why the two may differ though the servers did the same.

The definitions are read off the sources of SGLang 0.5.23 (`sglang/benchmark/serving.py`) and vLLM 0.33.0
(`vllm/benchmarks/serve.py`, `lib/endpoint_request_func.py`); ours stand in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdbench.peers.commands import TOOLS

Json = Mapping[str, Any]

_RATE = "over the duration above"
_OWN_PROMPTS = "its own prompts of the same length: random ids decoded to text"

#: tool -> metric -> how its definition differs from ours ("" and absent: it does not)
DIFFERENCES: dict[str, dict[str, str]] = {
    "sglang": {
        "completed": _OWN_PROMPTS,
        "failed": "theirs: a stream that ends early counts as completed",
        "duration_s": "theirs: from just before the first request until the last stream is closed",
        "input_throughput": "theirs: tokens that it meant to send; ours: those that the server counted",
        "output_throughput": "theirs: the server's count if an event with text has one, else as asked",
        "output_throughput_per_gpu": "not in the tool: the row above over all GPUs of the plan",
        "ttft_ms": "theirs: with opening a connection for each request, and parsing the event",
        "tpot_ms": "same formula, with its E2E",
        "itl_ms": "by event with text, as ours; by token where the server speculates",
        "e2e_ms": "theirs ends with the stream ([DONE]), ours with the last token",
    },
    "vllm": {
        "completed": _OWN_PROMPTS,
        "failed": "theirs: an answer that had one chunk counts as completed",
        "duration_s": "theirs: from just before the first request until the last stream is closed",
        "input_throughput": "the server's count, as ours; its own where the server is silent",
        "output_throughput": "the server's count, as ours; tokenised again where the server is silent",
        "output_throughput_per_gpu": "not in the tool: the row above over all GPUs of the plan",
        "ttft_ms": "theirs: until the first chunk, empty or not, is parsed; with waiting for a connection",
        "tpot_ms": "same formula, with its TTFT and E2E",
        "itl_ms": "by chunk, empty ones and the closing one too; ours by event with text",
        "e2e_ms": "theirs ends with the closing chunk, ours with the last token",
    },
}
#: on SGLang's own API a gap is divided by its tokens, so ours by token stands beside it
_GENERATE_ITL = "by token on /generate: beside our itl_token_ms"

_ROWS: tuple[tuple[str, str, str], ...] = (
    ("requests completed", "completed", ""),
    ("requests failed", "failed", ""),
    ("duration (s)", "duration_s", ""),
    ("requests/s", "request_throughput", ""),
    ("input tokens/s", "input_throughput", ""),
    ("output tokens/s", "output_throughput", ""),
    ("output tokens/s per GPU", "output_throughput_per_gpu", ""),
    *((f"TTFT {q} (ms)", "ttft_ms", q) for q in ("mean", "p50", "p99")),
    *((f"TPOT {q} (ms)", "tpot_ms", q) for q in ("mean", "p99")),
    *((f"ITL {q} (ms)", "itl_ms", q) for q in ("mean", "p99")),
    *((f"E2E {q} (ms)", "e2e_ms", q) for q in ("mean", "p99")),
)


@dataclass(frozen=True)
class Row:
    """One metric: ours, theirs (None: not there), and how theirs is defined otherwise."""

    name: str
    ours: float | None
    theirs: float | None
    why: str

    @property
    def apart(self) -> float | None:
        """Return how far theirs is from ours, as a share of ours."""
        return self.theirs / self.ours - 1 if self.ours and self.theirs is not None else None


def rows(tool: str, api: str, ours: Json, theirs: Json) -> list[Row]:
    """Return the comparison of a load point: its entry of summary.json beside what `pdbench.peers.read` made of theirs."""
    whys, found, told = DIFFERENCES[tool], [], set()
    gpus, rate = ours.get("gpus"), theirs.get("output_throughput")
    theirs = {**theirs, "output_throughput_per_gpu": rate / gpus if gpus and rate is not None else None}
    for name, key, statistic in _ROWS:
        by_token = (tool, api, key) == ("sglang", "generate", "itl_ms")
        # Said once, in the metric's first row.
        why = "" if key in told else _GENERATE_ITL if by_token else whys.get(key, _RATE if key == "request_throughput" else "")
        told.add(key)
        mine = ours.get("itl_token_ms" if by_token else key)
        found.append(Row(name, _pick(mine, statistic), _pick(theirs.get(key), statistic), why))
    return found


def _pick(value: object, statistic: str) -> float | None:
    value = value.get(statistic) if statistic and isinstance(value, Mapping) else value
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def problems(summary: Json) -> list[str]:
    """Return a sentence for each load point that a peer did not measure."""
    return [
        f"{title(name)}: load point {point.get('point')}: {point['problem']}"
        for name, tool in _tools(summary)
        for point in tool["points"]
        if point.get("problem")
    ]


def title(name: str) -> str:
    """Return what people call a peer, with its version."""
    return f"{TOOLS[name].title} {TOOLS[name].version}"


def compared(summary: Json) -> list[tuple[str, int, list[Row]]]:
    """Return (peer, load point, rows) for all that both measured; empty without a peer."""
    points = {p.get("point", i): p for i, p in enumerate(summary.get("points") or [summary])}
    return [
        (name, number, rows(name, str(summary.get("api")), points[number], point["figures"]))
        for name, tool in _tools(summary)
        for point in tool["points"]
        if (number := point.get("point")) in points and isinstance(point.get("figures"), Mapping)
    ]


def _tools(summary: Json) -> list[tuple[str, Json]]:
    found = summary.get("tools")
    return [(n, t) for n, t in found.items() if n in TOOLS and isinstance(t, Mapping)] if isinstance(found, Mapping) else []


def shown(summary: Json, labels: Mapping[int, str]) -> str:
    """Return the comparison as text for a terminal, "" without a peer; ``labels``: load point -> its name."""
    parts, told = [], set()
    for name, number, found in compared(summary):
        head = [labels.get(number, f"point {number}"), "pdbench", name, "apart", "" if name in told else "how theirs is defined"]
        # How it is defined is said once a tool.
        body = [[r.name, figure(r.ours), figure(r.theirs), share(r.apart), "" if name in told else r.why] for r in found]
        told.add(name)
        parts.append(f"{title(name)}, run after pdbench:\n{_grid([head, *body])}")
    return "\n\n".join([*parts, *problems(summary)])


def _grid(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in (1, 2, 3)), line[4]]).rstrip() for line in lines
    )


def figure(value: float | None) -> str:
    """Return a figure with three or more digits, a dash where there is none."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 10**7:
        return f"{value:.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def share(value: float | None) -> str:
    """Return a difference as a percentage with its sign."""
    return "–" if value is None else f"{100 * value:+.1f} %"
