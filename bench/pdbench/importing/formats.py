"""Two formats of old results: what a file says, as rows of the tidy table (`pdbench.sweep.tidy`).

- ``vllm-suite``: logs named ``run_MODE_model_MODEL_conc4_pt256_mt512.log`` (MODE agg or disagg). Times to first token are of
  a pass that streams, throughputs of another that does not.
- ``sglang``: the JSON lines that ``sglang.bench_serving --output-file`` appends, one a measurement; keys as in
  ``sglang/benchmark/serving.py``. Older versions lack some percentiles: they stay missing.

Nobody can judge such a run, so ``valid`` stays missing; a file that says itself that it is invalid makes it false.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from pdbench.reading import json_of
from pdbench.sweep.tidy import IMPORTED

Json = dict[str, Any]
SUITE, SGLANG = IMPORTED + "vllm-suite", IMPORTED + "sglang"
_NAME = re.compile(r"run_(?P<mode>agg|disagg)(?:_model_(?P<model>.+))?_conc(?P<conc>\d+)_pt(?P<pt>\d+)_mt(?P<mt>\d+)\.log")
_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
#: what a line of a log holds -> (its beginning, the figures in it: name in the log -> ours)
_LINES: tuple[tuple[str, str], ...] = (
    ("first", r"== TTFT \(stream=true\) N=(\d+) =="),
    ("ttft", rf"p50={_NUMBER}s\s+p95={_NUMBER}s\s+min={_NUMBER}s\s+max={_NUMBER}s"),
    ("second", r"== Throughput \(stream=false\) N=(\d+), errors=(\d+) =="),
    ("user", rf"per-request tokens/sec: p50={_NUMBER}\s+p95={_NUMBER}\s+mean={_NUMBER}"),
    ("tokens", r"total generated tokens\s*=\s*(\d+)"),
    ("wall", rf"wall time \(whole run\)\s*=\s*{_NUMBER}s"),
    ("rate", rf"aggregate throughput\s*=\s*{_NUMBER} tokens/sec"),
)
_STARTS = (
    "== TTFT",
    "p50=",
    "== Throughput",
    "per-request tokens/sec",
    "total generated tokens",
    "wall time",
    "aggregate throughput",
)
#: how far a log's throughput may be from its tokens over its wall time: all three are rounded
_ROUNDING = 0.02
_SUITE_NOTE = "TTFT and throughput come from two passes, and the second did not stream"
_LATENCIES = {"ttft": "ttft_ms", "tpot": "tpot_ms", "itl": "itl_ms", "e2e_latency": "e2e_ms"}
_STATISTICS = {"mean": "mean", "median": "p50", "p90": "p90", "p95": "p95", "p99": "p99"}
_NEEDED = ("duration", "completed", "request_throughput", "output_throughput", "mean_ttft_ms")


class BadFile(Exception):
    """A file is not what its name says; the message says where and what."""


def reads(path: Path) -> bool:
    """Tell whether a file is named like one of the formats."""
    return path.suffix == ".jsonl" or _NAME.fullmatch(path.name) is not None


def read(path: Path) -> list[Json]:
    """Return the rows of a file; raise BadFile, with its line where there is one."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as why:
        raise BadFile(f"{path}: no text: byte {why.start} is not UTF-8") from None
    except OSError as why:
        raise BadFile(f"{path}: {why.strerror or why}") from None
    if path.suffix == ".jsonl":
        return _sglang(path, text)
    name = _NAME.fullmatch(path.name)
    if name is None:
        raise BadFile(
            f"{path}: neither *.jsonl of SGLang's benchmark nor a log of the vLLM suite, which is named "
            "run_MODE_model_MODEL_conc4_pt256_mt512.log with MODE agg or disagg"
        )
    return [_suite(path, text, name)]


def _suite(path: Path, text: str, name: re.Match[str]) -> Json:
    found: dict[str, tuple[float, ...]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        for (key, pattern), start in zip(_LINES, _STARTS, strict=True):
            if not line.strip().startswith(start):
                continue
            match = re.fullmatch(pattern, line.strip())
            if match is None:
                raise BadFile(f"{path}, line {number}: cannot be read, though it begins like {start!r} of the vLLM suite")
            if key in found:
                raise BadFile(f"{path}, line {number}: a second {start!r}: the log holds more than one measurement")
            found[key] = tuple(float(value) for value in match.groups())
            if not all(map(math.isfinite, found[key])):
                raise BadFile(f"{path}, line {number}: a number in it is too large to be measured")
    for (key, _), start in zip(_LINES, _STARTS, strict=True):
        if key not in found:
            raise BadFile(f"{path}: no line {start!r}: the measurement did not end, or this is no log of the vLLM suite")
    (sent, errors), (tokens,), (wall,), (rate,) = found["second"], found["tokens"], found["wall"], found["rate"]
    if errors > sent or wall <= 0:
        raise BadFile(f"{path}: {errors:g} errors of {sent:g} requests in {wall:g} s cannot be")
    if abs(rate * wall - tokens) > _ROUNDING * tokens + 1:
        raise BadFile(f"{path}: its throughput, {rate:g} tokens/s, is not its {tokens:g} tokens in {wall:g} s")
    return {
        "source": SUITE,
        "engine": "vllm",
        "ratio": name["mode"],
        # "/" of the model's name became "_" in the file's
        "model": (name["model"] or "").replace("_", "/", 1),
        **{"concurrency": int(name["conc"]), "isl": float(name["pt"]), "osl": float(name["mt"])},
        **{"completed": int(sent - errors), "failed": int(errors), "duration_s": wall},
        **{"request_throughput": (sent - errors) / wall, "output_throughput": rate, "tok_s_user": found["user"][2]},
        **{"ttft_ms_p50": 1000 * found["ttft"][0], "ttft_ms_p95": 1000 * found["ttft"][1]},
        "notes": _SUITE_NOTE,
        "run": path.name,
    }


def _sglang(path: Path, text: str) -> list[Json]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json_of(line)
        except ValueError as why:
            raise BadFile(f"{where}: no JSON: {why}") from None
        if not isinstance(value, dict):
            raise BadFile(f"{where}: no JSON object")
        lacking = [key for key in _NEEDED if value.get(key) is None]
        if lacking:
            raise BadFile(f"{where}: no result of SGLang's serving benchmark: it lacks {lacking[0]!r}")
        rows.append({**_measurement(value, where), "run": f"{path.name}:{number}"})
    if not rows:
        raise BadFile(f"{path}: it is empty")
    return rows


def _measurement(value: Json, where: str) -> Json:
    def number(key: str) -> float | None:
        found = value.get(key)
        if found is None:
            return None
        if not isinstance(found, (int, float)) or isinstance(found, bool) or not math.isfinite(found) or found < 0:
            raise BadFile(f"{where}: {key} is {json.dumps(found)[:40]}, which is no number of that kind")
        return float(found)

    def count(key: str) -> int | None:
        found = number(key)
        return None if found is None else int(found)

    completed, rate = count("completed"), value.get("request_rate")
    paced = isinstance(rate, (int, float)) and math.isfinite(rate)
    tag = str(value.get("tag") or "")
    errors = value.get("errors")
    info = value.get("server_info") if isinstance(value.get("server_info"), dict) else {}
    row: Json = {
        "source": SGLANG,
        "engine": "sglang",
        "engine_version": str((info or {}).get("version") or ""),
        "model": str((info or {}).get("model_path") or ""),
        "concurrency": None if paced else count("max_concurrency"),
        "request_rate": number("request_rate") if paced else None,
        "isl": _length(number("random_input_len"), number("total_input_tokens"), completed),
        "osl": _length(number("random_output_len"), number("total_output_tokens"), completed),
        "completed": completed,
        "failed": sum(bool(error) for error in errors) if isinstance(errors, list) else None,
        "duration_s": number("duration"),
        **{f"{name}_throughput": number(f"{name}_throughput") for name in ("request", "input", "output")},
        "goodput": number("request_goodput"),
        "notes": f"tag: {tag}" if tag else "",
    }
    for theirs, ours in _LATENCIES.items():
        row |= {f"{ours}_{mine}": number(f"{name}_{theirs}_ms") for name, mine in _STATISTICS.items()}
    # `pdbench export` says so in the tag.
    if "INVALID RUN" in tag:
        row |= {"valid": False, "invalid_reasons": "its tag says that the run is invalid"}
    if "the engine was emulated" in tag:
        row["emulated"] = True
    return row


def _length(asked: float | None, total: float | None, completed: int | None) -> float | None:
    """Return the length asked for; where the data set gave the lengths, their mean."""
    return asked if asked else total / completed if total is not None and completed else None
