"""What users write and hand over: traces, load files, data sets, sweeps, profiles, other tools' results."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from fuzz import law
from fuzz.damage import as_json, spoiled, spoiled_json, torn
from pdbench.importing import formats
from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.load.trace import Row, Scaling, read_trace
from pdbench.model import profile
from pdbench.profiling.trace import TraceError
from pdbench.profiling.trace import read as read_kineto
from pdbench.run.cli import parser
from pdbench.run.load_options import with_load_file
from pdbench.run.load_points import build
from pdbench.sweep import checkout as checkout  # pdlib comes from there
from pdbench.sweep import grid, journal, spec
from pdlib.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yml"))
TRACE = [
    {"timestamp": 1000 * n, "input_length": 600 + n, "output_length": 5 + n, "hash_ids": [0, n + 1]} for n in range(4)
]  # fmt: skip
LOADS: list[Any] = [
    {"concurrency": "2,4", "num_requests": 8, "isl": "8-16", "osl": 4, "seed": 3},
    {"isl": "normal:64:8", "osl": "4@0.7,8@0.3", "stages": [
        {"concurrency": 2, "num_requests": 4}, {"request_rate": 2.5, "arrival": "gamma:0.5", "num_requests": 4},
        {"request_rate": 1, "to": 8, "duration": 6}, {"batch": 3}]},
    {"isl": 32, "osl": 4, "concurrency": 2, "num_requests": 6, "conversation": {"turns": "2-3", "think": "0-1", "context": 1}},
    {"isl": 32, "osl": 4, "request_rate": 3, "duration": 2.5, "prefix_len": 16, "prefix_groups": 2, "warmup": 1},
]  # fmt: skip
PROMPTS = [
    [{"prompt": "one two", "output_tokens": 3}, {"prompt": "three", "output_tokens": 1}, {"prompt": "x y z", "max_tokens": 9}],
    [{"messages": [{"role": "user", "content": "a b"}], "output_tokens": 4}],
    [{"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two three"}]}],
]
SGLANG = {
    "tag": "t", "backend": "sglang", "request_rate": 4.0, "max_concurrency": 8, "duration": 10.5, "completed": 20,
    "random_input_len": 512, "random_output_len": 64, "total_input_tokens": 10240, "total_output_tokens": 1280,
    "request_throughput": 1.9, "input_throughput": 975.2, "output_throughput": 121.9, "mean_ttft_ms": 50.5, "p99_ttft_ms": 90.0,
    "median_ttft_ms": 49.0, "mean_tpot_ms": 8.1, "mean_itl_ms": 8.0, "mean_e2e_latency_ms": 560.0, "errors": ["", "x"],
    "server_info": {"version": "0.5.23", "model_path": "a/b"},
}  # fmt: skip
SUITE = """== TTFT (stream=true) N=10 ==
  p50=0.653s  p95=0.781s  min=0.080s  max=0.793s

== Throughput (stream=false) N=10, errors=0 ==
  per-request tokens/sec: p50=69.2  p95=75.1  mean=67.8
  total generated tokens = 8294
  wall time (whole run)   = 8.48s
  aggregate throughput    = 977.8 tokens/sec
"""
SUITE_NAME = "run_disagg_model_a_b_conc4_pt256_mt512.log"
KINETO = {"traceEvents": [
    {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 10.0, "dur": 4.0},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 5.0, "dur": 8.0},
    {"ph": "X", "cat": "user_annotation", "name": "step[DECODE bs=4]", "pid": 1, "tid": 1, "ts": 4.0, "dur": 12.0},
]}  # fmt: skip


@contextlib.contextmanager
def written(name: str, content: bytes) -> Iterator[Path]:
    """A file with this content, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def lines(rows: Sequence[Any]) -> bytes:
    return b"".join(as_json(row) + b"\n" for row in rows)


def spoiled_lines(rows: list[Any]) -> st.SearchStrategy[bytes]:
    values = spoiled(rows).map(lambda found: lines(found) if isinstance(found, list) else as_json(found))
    return st.one_of(values, torn(lines(rows)))


def _trace(path: Path) -> list[Row] | None:
    return law.read(lambda: read_trace(path, Scaling(0.5, 4000, 100)), LoadError, path.name)


def trace(data: st.DataObject) -> None:
    """A Mooncake trace: refused with its line, or rows with lengths from 1 up in the order of time."""
    with written("trace.jsonl", data.draw(spoiled_lines(TRACE))) as path:
        for row in _trace(path) or []:
            assert 1 <= row.isl <= 4000
            assert 1 <= row.osl <= 100
            assert row.arrival_s >= 0


def good_trace(data: st.DataObject) -> None:
    """Blank lines, more keys, another order of keys and Windows' line ends change nothing."""
    keys = data.draw(st.permutations([*TRACE[0], "chat_id"]))
    end = data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n  \n"]))
    rows = [{key: {**row, "chat_id": [n]}[key] for key in keys} for n, row in enumerate(TRACE)]
    with written("trace.jsonl", lines(TRACE)) as one, written("trace.jsonl", lines(rows).replace(b"\n", end)) as other:
        assert _trace(one) == _trace(other)


def _load(argv: list[str]) -> None:
    args = with_load_file(parser(), argv)
    for load in build(args, "completions", True).loads:
        # A load of millions is what was asked for; here it only need be described.
        if load.count <= 10_000:
            load.measured()


def load_file(data: st.DataObject) -> None:
    """A load file: refused with the key, or load points whose requests can be drawn."""
    good = data.draw(st.sampled_from(LOADS))
    text = data.draw(st.one_of(spoiled(good).map(lambda v: yaml.safe_dump(v).encode()), torn(yaml.safe_dump(good).encode())))
    with written("load.yml", text) as path:
        law.read(lambda: _load(["--load", str(path)]), LoadError)


def dataset(data: st.DataObject) -> None:
    """Prompts from a file: JSON lines, or one list."""
    good = data.draw(st.sampled_from(PROMPTS))
    text = data.draw(st.one_of(spoiled_lines(good), spoiled_json(good)))
    argv = ["--concurrency", "1", "--osl", "4"]
    with written("prompts.jsonl", text) as path:
        law.read(lambda: _load([*argv, "--dataset", str(path)]), LoadError)


def length(data: st.DataObject) -> None:
    """A length as it is typed."""
    good = data.draw(st.sampled_from(["512", "256-1024", "normal:512:64", "lognormal:512:0.4", "512@0.7,normal:4096:500@0.3"]))
    text = data.draw(torn(good.encode())).decode("utf-8", "replace")
    found = law.read(lambda: Lengths.parse(text), LoadError)
    if found is not None:
        assert Lengths.parse(str(found)).spelled == found.spelled


def sweep(data: st.DataObject) -> None:
    """A sweep's file: refused with the file's name, or cells."""
    good = data.draw(st.sampled_from(SWEEPS)).read_bytes()
    values = spoiled(yaml.safe_load(good)).map(lambda value: yaml.safe_dump(value).encode())
    with written("mine.yml", data.draw(st.one_of(values, values, torn(good)))) as path:
        law.read(lambda: grid.cells(spec.read(path), "inventory/local"), UserError, "mine")


EVENTS = [
    {"event": "started", "time": 1.0, "cell": "1p1d", "repeat": 1, "attempt": 1},
    {"event": "finished", "time": 2.0, "cell": "1p1d", "repeat": 1, "attempt": 1, "run": "runs/1p1d/1-1"},
    {"event": "failed", "time": 3.0, "cell": "agg", "repeat": 1, "attempt": 1, "why": "x"},
]


def sweep_journal(data: st.DataObject) -> None:
    """A sweep's journal, which --resume reads."""
    with written(journal.JOURNAL, data.draw(spoiled_lines(list(EVENTS)))) as path:

        def resumed() -> None:
            found = journal.Journal(path.parent)
            found.measured(), found.last(), found.attempts("1p1d", 1)

        law.read(resumed, UserError, path.name)


def model_profile(data: st.DataObject) -> None:
    """A performance profile: refused with file and key, or figures that are numbers."""
    good = (Path(profile.__file__).parent / "profiles" / "tiny.yml").read_bytes()
    values = spoiled(yaml.safe_load(good), most=1).map(lambda value: yaml.safe_dump(value).encode())
    with written("mine.yml", data.draw(st.one_of(values, values, torn(good)))) as path:
        found = law.read(lambda: profile.load(str(path)), profile.ProfileError, "mine.yml")
        if found is not None:
            assert found.model.layers > 0
            assert 0 <= found.measured_share <= 1


def imported(data: st.DataObject) -> None:
    """Results of SGLang's benchmark: every figure that is taken over is a number from 0 up."""
    _import("r.jsonl", data.draw(spoiled_lines([SGLANG, SGLANG])))


def imported_log(data: st.DataObject) -> None:
    """Logs of the vLLM suite."""
    _import(SUITE_NAME, data.draw(torn(SUITE.encode())))


def _import(name: str, content: bytes) -> None:
    with written(name, content) as path:
        rows = law.read(lambda: formats.read(path), formats.BadFile, name) or []
        for row in rows:
            assert row["output_throughput"] >= 0
            assert row["completed"] >= 0


def import_command(data: st.DataObject) -> None:
    """The whole verb: a table, or exit code 1 and why."""
    with written("r.jsonl", data.draw(spoiled_lines([SGLANG]))) as path:
        code, *_ = law.command(["import", path, "--output", path.parent / "out"], (0, 1), "r.jsonl")
        assert (code == 0) == (path.parent / "out" / "results.parquet").is_file()


def kineto(data: st.DataObject) -> None:
    """A profiler's trace."""
    with written("x.trace.json", data.draw(spoiled_json(KINETO))) as path:
        law.read(partial(read_kineto, path), TraceError, path.name)


def typed_options(data: st.DataObject) -> None:
    """Options of `pdbench run` with wrong values: exit code 2 and the option's name, before anything is sent."""
    good = {
        "--url": "http://127.0.0.1:9",
        "--model": "m",
        "--concurrency": "2",
        "--num-requests": "4",
        "--isl": "8",
        "--osl": "4",
    }
    more = {
        "--timeout": "5",
        "--until": "ttft_p99:5%",
        "--slo-ttft-ms": "5",
        "--max-time": "3",
        "--token-ids": "3-9",
        "--seed": "1",
    }
    given = {
        **good,
        **data.draw(st.dictionaries(st.sampled_from(sorted(more)), st.none(), max_size=2).map(lambda d: {k: more[k] for k in d})),
    }
    name = data.draw(st.sampled_from(sorted(given)))
    given[name] = data.draw(
        st.sampled_from(["", "x", "-1", "0", "1e999", "nan", "inf", "0x10", "1,,2", "1_0", "٣", "9" * 400, "5:5"])
    )
    from pdbench.run.cli import planned

    argv = [word for item in given.items() for word in ("=".join(item),)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        law.read(lambda: planned(with_load_file(parser(), [*argv, "--output", folder])), LoadError)


SURFACES: dict[str, Callable[[st.DataObject], None]] = {
    one.__name__: one
    for one in (trace, good_trace, load_file, dataset, length, sweep, sweep_journal, model_profile, imported, imported_log,
                import_command, kineto, typed_options)
}  # fmt: skip
