"""The `export` verb: a run in the file format of another tool, so that scripts made for that tool read it.

``sglang`` is what `python -m sglang.benchmark.serving --output-file` appends: one JSON object a line, here one a load point.
Keys and definitions follow `sglang/benchmark/serving.py` of SGLang 0.5.23; where ours differ (docs/metrics.md), ours hold.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pdbench import __version__, metrics
from pdbench.gate.rundata import NotARun, Point, RunData, load
from pdbench.records import Record, replacing
from pdbench.report.words import verdict
from pdbench.verbs import ends_by_code

_INVALID = 3
#: what SGLang calls the three ways to ask
_BACKENDS = {"completions": "sglang-oai", "chat": "sglang-oai-chat", "generate": "sglang"}
#: our key -> SGLang's name in `mean_NAME_ms` and so on
_LATENCIES = {"e2e_ms": "e2e_latency", "ttft_ms": "ttft", "tpot_ms": "tpot", "itl_ms": "itl"}
_SLOS = {"ttft_ms": "ttft", "tpot_ms": "tpot", "e2e_ms": "e2el"}


@ends_by_code
def main(argv: list[str]) -> int:
    """Return 0 when the file stands, 3 when the run is not to be believed, 1 when it cannot be made, 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="pdbench export",
        description="Write a run as another tool's result file.",
        epilog="A run that failed its checks, or had none, is exported only with --invalid, and its tag says so.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the run, such as results/latest")
    parser.add_argument("--format", choices=["sglang"], required=True, help="sglang: the JSON lines of its serving benchmark")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (DIR/FORMAT.jsonl)")
    parser.add_argument("--details", action="store_true", help="every request's lengths and times, as --output-details there")
    parser.add_argument("--invalid", action="store_true", help="export the run although it is not valid")
    args = parser.parse_args(argv)
    try:
        run = load(args.folder)
        found = verdict(run)
        if not found.valid and not args.invalid:
            why = found.reasons[0] if found.reasons else "a check failed"
            print(f"pdbench export: this run is not to be believed: {why}; --invalid exports it all the same", file=sys.stderr)
            return _INVALID
        path = args.output or args.folder / f"{args.format}.jsonl"
        lines = [json.dumps(sglang_line(run, point, found.stamp, args.details)) for point in run.points if point.good]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except NotARun as why:
        print(f"pdbench export: {why}", file=sys.stderr)
        return 1
    except OSError as why:
        print(f"pdbench export: cannot write {args.output or args.folder}: {why.strerror or why}", file=sys.stderr)
        return 1
    print(f"export: {path} ({len(lines)} load points)")
    return 0


def sglang_line(run: RunData, point: Point, stamp: str, details: bool = False) -> dict[str, Any]:
    """Return one load point as SGLang writes it; ``stamp`` ("INVALID RUN") goes into the tag, as does an emulated engine."""
    summary, good = point.summary, point.good
    api = str(run.summary.get("api"))
    # SGLang divides a gap by its tokens on /generate, and nowhere else.
    gaps = metrics.token_itl_s if api == "generate" else metrics.itl_s
    values = {
        "e2e_ms": [metrics.e2e_s(r) for r in good],
        "ttft_ms": [metrics.ttft_s(r) for r in good],
        "tpot_ms": [tpot for r in good if (tpot := metrics.tpot_s(r)) is not None],
        "itl_ms": [gap for r in good for gap in gaps(r)],
    }
    whole = metrics.summarise(point.records)
    rate = summary.get("request_rate")
    tag = ", ".join(filter(None, (f"pdbench {__version__}", run.no_gpu, stamp)))
    line: dict[str, Any] = {
        "tag": tag,
        "backend": _BACKENDS.get(api, api),
        "dataset_name": summary.get("trace") or "random-ids",
        # As there: without a rate all are sent as fast as the concurrency allows, and a trace has times of its own.
        "request_rate": "trace" if summary.get("time_scale") is not None else math.inf if rate is None else rate,
        "max_concurrency": summary.get("concurrency"),
        "sharegpt_output_len": None,
        "random_input_len": _length(summary.get("isl")),
        "random_output_len": _length(summary.get("osl")),
        "random_range_ratio": 1.0,
        "server_info": _server_info(point),
        "duration": whole["duration_s"],
        "completed": whole["completed"],
        "total_input_tokens": whole["input_tokens"],
        "total_input_text_tokens": whole["input_tokens"],
        "total_input_vision_tokens": 0,
        "total_output_tokens": whole["output_tokens"],
        # Nothing is tokenised again here: the server's own count stands in both.
        "total_output_tokens_retokenized": whole["output_tokens"],
        **{f"{name}_throughput": whole[f"{name}_throughput"] for name in ("request", "input", "output", "total")},
    }
    for key, name in _LATENCIES.items():
        line |= _spread(name, values[key])
    tokens, flying = _peaks(good)
    line |= {
        "concurrency": whole["mean_in_flight"],
        "accept_length": None,
        "max_output_tokens_per_s": tokens,
        "max_concurrent_requests": flying,
        **_goodput(summary.get("goodput")),
    }
    return line | (_details(point.records, gaps) if details else {})


def _length(text: object) -> int | None:
    return int(text) if isinstance(text, str) and text.isdecimal() else None


def _server_info(point: Point) -> dict[str, Any] | None:
    workers = (point.evidence.get("after") or {}).get("workers") or {}
    return next((worker["server_info"] for worker in workers.values() if worker.get("server_info")), None)


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = np.array(seconds or [0.0]) * 1000
    quantiles = dict(zip((90, 95, 99), np.percentile(values, (90, 95, 99)), strict=True))
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        **{f"p{p}_{name}_ms": float(value) for p, value in quantiles.items()},
    }


def _peaks(good: Sequence[Record]) -> tuple[float, int]:
    """Return the most tokens, and requests in flight, of any whole second since the first request."""
    start = min(r.sent_s for r in good)
    seconds = math.ceil(max(r.end_s for r in good) - start) + 1
    tokens, flying = np.zeros(seconds), np.zeros(seconds, dtype=np.int64)
    for r in good:
        counted = len(r.chunk_tokens) == len(r.chunk_s)
        share = metrics.output_tokens(r) / max(1, len(r.chunk_s))
        places = (np.array(r.chunk_s) - start).astype(int)
        np.add.at(tokens, places, r.chunk_tokens if counted else share)
        flying[int(r.sent_s - start) : int(r.end_s - start) + 1] += 1
    return float(tokens.max()), int(flying.max())


def _goodput(found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        return {}
    return {
        "goodput_slos_ms": {_SLOS[name]: limit for name, limit in found["slo"].items()},
        "request_goodput": found["request_throughput"],
        "slo_attainment": found["attainment"],
        "slo_attainment_by_metric": {_SLOS[name]: share for name, share in (found.get("met") or {}).items()},
    }


def _details(records: Sequence[Record], gaps: Any) -> dict[str, list[Any]]:
    """Every request in its order; texts are not kept."""
    return {
        "input_lens": [metrics.input_tokens(r) for r in records],
        "output_lens": [metrics.output_tokens(r) if r.ok else 0 for r in records],
        "ttfts": [metrics.ttft_s(r) if r.ok else 0.0 for r in records],
        "itls": [gaps(r) if r.ok else [] for r in records],
        "generated_texts": ["" for _ in records],
        "errors": [r.error for r in records],
    }
