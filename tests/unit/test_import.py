"""`pdbench import`: old results of other tools beside our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.runfolder import good

from pdbench.cli import main
from pdbench.importing.formats import BadFile, read
from pdbench.sweep import tidy

DISAGG = """== TTFT (stream=true) N=10 ==
  p50=0.653s  p95=0.781s  min=0.080s  max=0.793s

== Throughput (stream=false) N=10, errors=0 ==
  per-request tokens/sec: p50=69.2  p95=75.1  mean=67.8
  total generated tokens = 8294
  wall time (whole run)   = 8.48s
  aggregate throughput    = 977.8 tokens/sec
"""
AGG = (
    DISAGG.replace("0.653", "0.712")
    .replace("8294", "8301")
    .replace("8.48s", "10.12s")
    .replace("977.8", "820.2")
    .replace("errors=0", "errors=1")
)
NAME = "run_{}_model_Qwen_Qwen2.5-7B-Instruct_conc4_pt256_mt512.log"


def logs(folder: Path) -> Path:
    folder.mkdir()
    (folder / NAME.format("disagg")).write_text(DISAGG)
    (folder / NAME.format("agg")).write_text("INFO something else\n" + AGG)
    return folder


def test_the_logs_of_the_suite_become_rows_with_their_figures(tmp_path: Path) -> None:
    out = tmp_path / "old"
    told = ["--ratio", "disagg=1p1d", "--gpus", "disagg=2", "--gpus", "agg=1"]
    assert main(["import", str(logs(tmp_path / "in")), "--output", str(out), *told]) == 0
    rows = {row["ratio"]: row for row in tidy.read(out).to_dict("records")}
    one, other = rows["1p1d"], rows["agg"]
    assert (one["ttft_ms_p50"], one["ttft_ms_p95"], one["tok_s_user"]) == (653.0, 781.0, 67.8)
    assert (one["output_throughput"], one["output_throughput_per_gpu"], one["duration_s"]) == (977.8, 488.9, 8.48)
    assert (one["concurrency"], one["isl"], one["osl"], one["model"]) == (4, 256, 512, "Qwen/Qwen2.5-7B-Instruct")
    assert (one["prefill_workers"], one["decode_workers"], one["aggregated_workers"]) == (1, 1, 0)
    assert (other["completed"], other["failed"], other["aggregated_workers"], other["gpus"]) == (9, 1, 1, 1)
    assert {row["source"] for row in rows.values()} == {"import:vllm-suite"}
    assert all(pd.isna(row["valid"]) for row in rows.values())
    assert pd.isna(one["ttft_ms_p99"])


def test_a_run_exported_for_sglang_comes_back_with_the_same_figures(tmp_path: Path) -> None:
    run = good(concurrency=(4, 8)).write(tmp_path / "r")
    assert main(["gate", str(run)]) == 0
    assert main(["export", str(run), "--format", "sglang", "--details"]) == 0
    assert main(["import", str(run / "sglang.jsonl"), "--output", str(tmp_path / "i"), "--ratio", "3p1d", "--gpus", "4"]) == 0
    ours, theirs = tidy.read_runs([run]), tidy.read(tmp_path / "i")
    same = [name for name in tidy.COLUMNS if name.startswith(("ttft", "tpot", "e2e", "itl")) or name.endswith("throughput")]
    same += [
        "concurrency",
        "isl",
        "osl",
        "completed",
        "failed",
        "duration_s",
        "output_throughput_per_gpu",
        "prefill_workers",
        "gpus",
    ]
    pd.testing.assert_frame_equal(theirs[same], ours[same], check_exact=False)
    assert set(theirs["source"]) == {"import:sglang"}
    assert theirs["valid"].isna().all()


def test_what_says_itself_that_it_is_invalid_stays_so(tmp_path: Path) -> None:
    run = good(concurrency=(4,)).write(tmp_path / "r")
    assert main(["export", str(run), "--format", "sglang", "--invalid"]) == 0
    line = json.loads((run / "sglang.jsonl").read_text())
    (tmp_path / "a.jsonl").write_text(json.dumps({**line, "tag": "pdbench 0.1.0, the engine was emulated, INVALID RUN"}))
    assert main(["import", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "i")]) == 0
    (row,) = tidy.read(tmp_path / "i").to_dict("records")
    assert (row["valid"], row["emulated"]) == (False, True)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (NAME.format("agg"), AGG.replace("p95=0.781s", "p95=oops"), ", line 2: cannot be read, though it begins like 'p50='"),
        (NAME.format("agg"), AGG + AGG, ", line 9: a second '== TTFT': the log holds more than one measurement"),
        (NAME.format("agg"), AGG[: AGG.index("  wall")], ": no line 'wall time': the measurement did not end"),
        (
            NAME.format("agg"),
            AGG.replace("820.2", "1820.2"),
            ": its throughput, 1820.2 tokens/s, is not its 8301 tokens in 10.12 s",
        ),
        (NAME.format("agg"), AGG.replace("errors=1", "errors=11"), ": 11 errors of 10 requests in 10.12 s cannot be"),
        ("run_both_conc4.log", AGG, ": neither *.jsonl of SGLang's benchmark nor a log of the vLLM suite"),
        ("a.jsonl", '{"duration": 1}\n', ", line 1: no result of SGLang's serving benchmark: it lacks 'completed'"),
        ("a.jsonl", "\n{", ", line 2: no JSON"),
        ("a.jsonl", "[]", ", line 1: no JSON object"),
        ("a.jsonl", "", ": it is empty"),
        ("a.jsonl", "\udcff", ": no text: byte 0 is not UTF-8"),
    ],
)
def test_a_bad_file_is_one_message_and_the_others_are_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    (tmp_path / NAME.format("disagg")).write_text(DISAGG)
    files = [str(tmp_path / name), str(tmp_path / NAME.format("disagg"))]
    assert main(["import", *files, "--output", str(tmp_path / "i")]) == 1
    shown = capsys.readouterr()
    assert f"{tmp_path / name}{said}" in shown.err
    assert shown.err.count("\n") == 1
    assert list(tidy.read(tmp_path / "i")["ratio"]) == ["disagg"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ratio", "3x1d"], "--ratio 3x1d: write it as 3p1d"),
        (["--gpus", "some=4"], "--gpus some=4: write it as 4 or disagg=4"),
        (["--gpus", "0"], "--gpus 0: write it"),
    ],
)
def test_bad_usage_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert main(["import", str(tmp_path), "--output", str(tmp_path / "i"), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(logs(tmp_path / "in")), tmp_path / "i"
    assert main(["import", source, "--output", str(out)]) == 0
    assert main(["import", source, "--output", str(out)]) == 0  # an import may be made again
    (out / "sweep.json").write_text('{"schema": 1, "cells": []}')
    assert main(["import", source, "--output", str(out)]) == 2
    assert main(["import", source, "--output", str(tmp_path / "in")]) == 2
    assert "no import" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "nothing.log"), "--output", str(tmp_path / "j")]) == 1


_FIGURE = st.floats(0.01, 900).map(lambda value: round(value, 3))


@settings(max_examples=40, deadline=None)
@given(st.tuples(_FIGURE, _FIGURE, _FIGURE), st.integers(1, 10**6), st.integers(1, 64), st.sampled_from(["agg", "disagg"]))
def test_every_log_as_the_suite_writes_it_is_read(
    tmp_path_factory: pytest.TempPathFactory, figures: tuple[float, float, float], tokens: int, slots: int, mode: str
) -> None:
    median, mean, wall = figures
    text = (
        f"== TTFT (stream=true) N=10 ==\n  p50={median}s  p95={median}s  min=0.080s  max=900s\n\n"
        f"== Throughput (stream=false) N=10, errors=0 ==\n  per-request tokens/sec: p50=1.0  p95=2.0  mean={mean}\n"
        f"  total generated tokens = {tokens}\n  wall time (whole run)   = {wall}s\n"
        f"  aggregate throughput    = {tokens / wall} tokens/sec\n"
    )
    path = tmp_path_factory.mktemp("log") / f"run_{mode}_conc{slots}_pt256_mt512.log"
    path.write_text(text)
    (row,) = read(path)
    assert (row["ttft_ms_p50"], row["tok_s_user"], row["concurrency"], row["ratio"]) == (1000 * median, mean, slots, mode)
    assert row["output_throughput"] == pytest.approx(tokens / wall)


_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=2), max_leaves=3
)
_KEYS = [
    "duration",
    "completed",
    "request_throughput",
    "output_throughput",
    "mean_ttft_ms",
    "max_concurrency",
    "request_rate",
    "errors",
]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from([*_KEYS, "server_info", "tag", "total_input_tokens"]), _JSON), st.text(max_size=20))
def test_no_content_at_all_is_a_traceback(tmp_path_factory: pytest.TempPathFactory, line: dict[str, Any], junk: str) -> None:
    folder = tmp_path_factory.mktemp("junk")
    for name, content in (("a.jsonl", json.dumps(line)), ("b.jsonl", junk), (NAME.format("agg"), AGG[: len(junk) * 10] + junk)):
        (folder / name).write_text(content, encoding="utf-8", errors="replace")
        said = ""
        try:
            rows = read(folder / name)
        except BadFile as why:
            rows, said = [], str(why)
        assert rows or said.startswith(str(folder / name))
