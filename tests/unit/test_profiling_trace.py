"""Traces in Chrome's format: times, kernels, and files that are not whole."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.profiling.read import digest, main
from pdbench.profiling.trace import TraceError, covered, own_times, read

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda s: (float(s[0]), float(s[0] + s[1]))), max_size=20)


@given(spans)
def test_covered_counts_every_moment_once(found: list[tuple[float, float]]) -> None:
    moments = {tick for begin, end in found for tick in range(int(begin), int(end))}
    assert covered(found) == len(moments)


@st.composite
def nested(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Operators of one thread: each lies inside its caller, and callees do not overlap."""
    events: list[dict[str, Any]] = []

    def inside(begin: int, end: int, depth: int) -> None:
        at = begin
        while at < end and depth < 4 and draw(st.booleans()):
            start = draw(st.integers(at, end - 1))
            stop = draw(st.integers(start + 1, end))
            name = draw(st.sampled_from("abc"))
            events.append({"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": 1, "ts": start, "dur": stop - start})
            inside(start, stop, depth + 1)
            at = stop

    inside(0, draw(st.integers(1, 60)), 0)
    return draw(st.permutations(events)) if len({(e["ts"], e["dur"]) for e in events}) == len(events) else events


@given(nested())
def test_own_times_add_up_to_the_time_that_any_operator_ran(events: list[dict[str, Any]]) -> None:
    whole = covered((e["ts"], e["ts"] + e["dur"]) for e in events)
    found = own_times(events)
    assert sum(kernel.total_ms for kernel in found) * 1000 == pytest.approx(whole)
    assert sum(kernel.calls for kernel in found) == len(events)
    assert all(kernel.total_ms >= -1e-9 for kernel in found)


def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": dur}


def write(path: Path, events: list[dict[str, Any]], **more: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events, **more}).encode()))
    return path


GPU = [
    event("user_annotation", "step[DECODE bs=8 toks=8]", 0, 900),
    event("user_annotation", "step[DECODE bs=8 toks=8]", 1000, 900),
    event("gpu_user_annotation", "step[DECODE bs=8 toks=8]", 5, 900),
    event("kernel", "gemm", 100, 600),
    event("kernel", "gemm", 1100, 600),
    event("kernel", "attention", 600, 200),
    event("cpu_op", "aten::mm", 50, 20),
    {"ph": "M", "name": "process_name", "pid": 1},
]


def test_a_gpu_trace_names_its_kernels_and_how_busy_the_gpu_was(tmp_path: Path) -> None:
    found = read(write(tmp_path / "p-TP-3-DP-1-DECODE.trace.json.gz", GPU))
    assert found.rank == "TP-3-DP-1"
    assert found.on_gpu
    assert [(k.name, k.calls, k.total_ms) for k in found.kernels] == [("gemm", 2, 1.2), ("attention", 1, 0.2)]
    # kernels run from 100 to 800 and from 1100 to 1700 us
    assert found.span_ms == pytest.approx(1.6)
    assert found.gpu_ms == pytest.approx(1.3)
    assert found.steps_ms == (0.9, 0.9)
    assert found.gaps_ms == (1.0,)
    assert found.batch == (8, 8)


@pytest.mark.parametrize("spoil", [lambda raw: raw[:-20], lambda raw: b"", lambda raw: gzip.compress(b"{}"), lambda raw: raw[3:]])
def test_a_trace_that_is_not_whole_is_named(tmp_path: Path, spoil: Any) -> None:
    path = write(tmp_path / "p-TP-0.trace.json.gz", GPU)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(TraceError, match="p-TP-0"):
        read(path)


def test_an_empty_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="holds no event"):
        read(write(tmp_path / "p-TP-0.trace.json.gz", [{"ph": "M", "name": "x", "pid": 1}]))


def folder(path: Path, ranks: int) -> Path:
    rank = {"host": "n1", "gpus": list(range(ranks)), "unit": "pd-decode-0.service"}
    worker = {"name": "decode-0", "role": "decode", "url": "http://127.0.0.1:1", "ranks": [rank]}
    plan = {"ratio": "1p1d", "emulated": False, "hosts": {"n1": {"state_dir": "/x"}}, "workers": [worker]}
    path.mkdir(exist_ok=True)
    (path / "plan.json").write_text(json.dumps(plan))
    (path / "profile.json").write_text(json.dumps({"wish": {"role": "decode", "steps": 2}, "problems": [], "cut_short": []}))
    return path


def test_every_rank_must_have_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = folder(tmp_path / "p", 2)
    write(where / "traces" / "decode-0" / "p-TP-0.trace.json.gz", GPU)
    assert main([str(where)]) == 1
    assert "decode-0 has 2 ranks, and traces came of: TP-0" in capsys.readouterr().err
    write(where / "traces" / "decode-0" / "p-TP-1.trace.json.gz", GPU)
    assert main([str(where)]) == 0
    shown = capsys.readouterr().out
    assert "gemm" in shown
    assert "81%" in shown
    assert json.loads((where / "traces.json").read_text())["workers"]["decode-0"]["ranks"] == 2


def test_a_trace_without_a_step_is_no_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = folder(tmp_path / "p", 1)
    write(where / "traces" / "decode-0" / "p-TP-0.trace.json.gz", [event("cpu_op", "aten::mm", 50, 20)])
    told = json.loads((where / "profile.json").read_text())
    (where / "profile.json").write_text(json.dumps({**told, "cut_short": ["decode-0"]}))
    assert main([str(where)]) == 1
    assert "decode-0 recorded none of 2 steps: the load was over" in capsys.readouterr().err


def test_the_log_gives_throughput_and_gap(tmp_path: Path) -> None:
    where = folder(tmp_path / "p", 1)
    write(where / "traces" / "decode-0" / "p-TP-0.trace.json.gz", GPU)
    (where / "logs").mkdir()
    line = "Decode batch, #running-req: 100, #token: 900, token usage: 0.10, gen throughput (token/s): 5000.00, #queue-req: 0\n"
    (where / "logs" / "n1-pd-decode-0.log").write_text(line * 3)
    log = digest(where)[0]["workers"]["decode-0"]["log"]
    assert log == {"lines": 3, "tokens_per_s": 5000.0, "requests": 100, "gap_ms": 20.0}


def test_a_folder_that_is_none_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no")]) == 2
    assert main([str(tmp_path)]) == 1
    assert "plan.json" in capsys.readouterr().err
