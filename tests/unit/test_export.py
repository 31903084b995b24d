"""A run as SGLang's own benchmark would have written it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.runfolder import Run, good

from pdbench.cli import main
from pdbench.metrics import Slo, itl_s, ttft_s

#: the keys of `result` in sglang/benchmark/serving.py 0.5.23, in their order
_KEYS = """tag backend dataset_name request_rate max_concurrency sharegpt_output_len random_input_len random_output_len
random_range_ratio server_info duration completed total_input_tokens total_input_text_tokens total_input_vision_tokens
total_output_tokens total_output_tokens_retokenized request_throughput input_throughput output_throughput total_throughput
mean_e2e_latency_ms median_e2e_latency_ms std_e2e_latency_ms p90_e2e_latency_ms p95_e2e_latency_ms p99_e2e_latency_ms
mean_ttft_ms median_ttft_ms std_ttft_ms p90_ttft_ms p95_ttft_ms p99_ttft_ms
mean_tpot_ms median_tpot_ms std_tpot_ms p90_tpot_ms p95_tpot_ms p99_tpot_ms
mean_itl_ms median_itl_ms std_itl_ms p90_itl_ms p95_itl_ms p99_itl_ms
concurrency accept_length max_output_tokens_per_s max_concurrent_requests"""


def export(run: Run, folder: Path, *options: str) -> list[dict[str, Any]]:
    run.write(folder)
    assert main(["gate", str(folder)]) == 0
    assert main(["export", str(folder), "--format", "sglang", *options]) == 0
    return [json.loads(line) for line in (folder / "sglang.jsonl").read_text().splitlines()]


def test_every_key_that_scripts_read_is_there_with_our_figures(tmp_path: Path) -> None:
    run = good(concurrency=(4, 8))
    first, second = export(run, tmp_path)
    assert list(first) == _KEYS.split()
    summary = json.loads((tmp_path / "summary.json").read_text())["points"][0]
    for ours, theirs in (("ttft_ms", "ttft"), ("tpot_ms", "tpot"), ("itl_ms", "itl"), ("e2e_ms", "e2e_latency")):
        for statistic, name in (("mean", "mean"), ("p50", "median"), ("p99", "p99")):
            assert first[f"{name}_{theirs}_ms"] == pytest.approx(summary[ours][statistic])
    assert first["std_ttft_ms"] == pytest.approx(float(np.std([1000 * ttft_s(r) for r in run.measured(0)])))
    assert (first["max_concurrency"], second["max_concurrency"]) == (4, 8)
    assert (first["request_rate"], first["random_input_len"], first["random_output_len"]) == (math.inf, 64, 6)
    assert (first["completed"], first["total_output_tokens"]) == (24, 144)
    assert first["output_throughput"] == pytest.approx(summary["output_throughput"])
    assert 4 <= first["max_concurrent_requests"] <= 24
    assert first["max_output_tokens_per_s"] <= 144
    assert first["server_info"]["version"] == "0.5.23"


def test_details_and_goodput_are_those_of_sglang(tmp_path: Path) -> None:
    run = good(concurrency=(), rates=(5.0,))
    run.slo = Slo(ttft_ms=100, e2e_ms=500)
    (line,) = export(run, tmp_path, "--details")
    records = run.measured()
    assert line["request_rate"] == 5.0
    assert line["ttfts"] == pytest.approx([ttft_s(r) for r in records])
    assert [len(gaps) for gaps in line["itls"]] == [5] * 24
    assert line["itls"][3] == pytest.approx(itl_s(records[3]))
    assert line["goodput_slos_ms"] == {"ttft": 100, "e2el": 500}
    assert line["slo_attainment"] == pytest.approx(sum(ttft_s(r) <= 0.1 and r.end_s - r.sent_s <= 0.5 for r in records) / 24)
    assert set(line["slo_attainment_by_metric"]) == {"ttft", "e2el"}


def test_an_emulated_run_says_so_in_its_tag(tmp_path: Path) -> None:
    (line,) = export(good(concurrency=(4,), emulated=True), tmp_path)
    assert "the engine was emulated" in line["tag"]


def test_a_run_that_is_not_valid_is_refused_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = good(concurrency=(4,))
    run.measured()[2].output_tokens = 5
    run.write(tmp_path)
    assert main(["export", str(tmp_path), "--format", "sglang"]) == 3
    assert "nobody has checked this run" in capsys.readouterr().err
    main(["gate", str(tmp_path)])
    assert main(["export", str(tmp_path), "--format", "sglang"]) == 3
    assert "do not have the length that was forced" in capsys.readouterr().err
    assert not (tmp_path / "sglang.jsonl").exists()
    assert main(["export", str(tmp_path), "--format", "sglang", "--invalid", "--output", str(tmp_path / "x.jsonl")]) == 0
    assert "INVALID RUN" in json.loads((tmp_path / "x.jsonl").read_text())["tag"]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["{}"], 2, "--format"),
        (["{}", "--format", "vllm"], 2, "invalid choice"),
        (["{}/nowhere", "--format", "sglang"], 1, "is not a folder"),
        (["{}", "--format", "sglang"], 1, "is not the folder of a run"),
    ],
)
def test_bad_usage(args: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *(arg.format(tmp_path) for arg in args)]) == code
    assert says in capsys.readouterr().err
