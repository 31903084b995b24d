from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.emulate.handshake import Kv, Timeouts
from pdbench.emulate.metrics import Histogram, Throughput, WorkerMetrics
from pdbench.emulate.text import prompt_of


@given(st.lists(st.floats(0, 1e4), min_size=1))
def test_a_histogram_counts_every_value_once(values: list[float]) -> None:
    histogram = Histogram("h", "text", {"a": "b"}, (1, 10, 100))
    for value in values:
        histogram.observe(value)
    lines = histogram.lines()
    assert lines[0] == f'h_bucket{{a="b",le="1.0"}} {sum(value <= 1 for value in values)}'
    assert lines[1] == f'h_bucket{{a="b",le="10.0"}} {sum(value <= 10 for value in values)}'
    assert lines[3] == f'h_bucket{{a="b",le="+Inf"}} {len(values)}'
    assert lines[4] == f'h_count{{a="b"}} {len(values)}'
    assert float(lines[5].split()[-1]) == pytest.approx(sum(values))


def test_what_never_moved_has_no_sample_but_gauges_have() -> None:
    metrics = WorkerMetrics('na"me', "decode")
    assert "\nsglang:num_requests_total{" not in metrics.text()
    metrics.requests.inc(1, "true")
    metrics.running.inc()
    page = metrics.text()
    assert 'sglang:num_requests_total{model_name="na\\"me",engine_type="decode",is_streaming="true"} 1\n' in page
    assert "# TYPE sglang:num_requests_total counter\n" in page
    assert "# TYPE sglang:num_running_reqs gauge\n" in page
    assert "# TYPE sglang:kv_transfer_total_mb histogram\n" in page


def test_timeouts_are_sglangs_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BOOTSTRAP_TIMEOUT", "WAITING_TIMEOUT", "HEARTBEAT_INTERVAL", "HEARTBEAT_MAX_FAILURE"):
        monkeypatch.delenv(f"SGLANG_DISAGGREGATION_{name}", raising=False)
    assert Timeouts.from_environment() == Timeouts(300, 300, 5, 2)
    monkeypatch.setenv("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", "1.5")
    monkeypatch.setenv("SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE", "3")
    assert Timeouts.from_environment() == Timeouts(1.5, 300, 5, 3)
    for bad in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", bad)
        with pytest.raises(ValueError, match="SGLANG_DISAGGREGATION_WAITING_TIMEOUT must be a number above 0"):
            Timeouts.from_environment()


def test_the_kv_message_survives_the_wire_and_nothing_else_does() -> None:
    kv = Kv(prompt_of([1, 2, 3]), 42, "rdma")
    said = kv.to_json(7)
    assert Kv.from_json(said) == kv
    for bad in ({}, {"tokens": 1}, {**said, "digest": "xyz"}, {**said, "tokens": None}, {**said, "bytes": "many"}):
        with pytest.raises(ValueError, match="not a KV message"):
            Kv.from_json(bad)


def samples(metrics: WorkerMetrics) -> list[str]:
    return [line for line in metrics.text().splitlines() if not line.startswith("#")]


def test_several_own_labels() -> None:
    metrics = WorkerMetrics("m", "decode")
    metrics.kv_transfers.inc(1, ("10.0.0.1:8998", "rdma"))
    metrics.kv_transfers.inc(1, ("10.0.0.1:8998", "rdma"))
    metrics.kv_bytes.inc(5, ("10.0.0.1:8998", "tcp"))
    metrics.stage.observe(0.5, "decode_bootstrap")
    front = 'model_name="m",engine_type="decode"'
    rows = samples(metrics)
    assert f'pdbench_emulator_kv_transfers_total{{{front},peer="10.0.0.1:8998",transport="rdma"}} 2' in rows
    assert f'pdbench_emulator_kv_bytes_total{{{front},peer="10.0.0.1:8998",transport="tcp"}} 5' in rows
    assert any('stage="decode_bootstrap",le="+Inf"} 1' in row for row in rows)


def test_a_switched_role_is_in_every_label() -> None:
    metrics = WorkerMetrics("m", "prefill")
    metrics.requests.inc(1, "true")
    metrics.relabel("decode")
    assert samples(metrics)
    assert all('engine_type="decode"' in row for row in samples(metrics))


def test_throughput_is_that_of_the_last_forty_steps_until_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("pdbench.emulate.metrics.time.monotonic", lambda: clock[0])
    gauge = Throughput("t", "text", {})
    for step in range(1, 80):
        clock[0] += 0.05
        gauge.step(10)
        # 40 steps of 10 tokens in 2 s
        assert gauge.value == (0 if step < 40 else pytest.approx(200))
    clock[0] += 27
    assert gauge.value == pytest.approx(200)
    clock[0] += 4
    assert gauge.value == 0
    assert gauge.lines() == ["t{} 0"]


def test_lateness_has_fine_buckets_around_the_promise() -> None:
    metrics = WorkerMetrics("m", "decode")
    metrics.lateness.observe(0.00301)
    rows = {row.split('le="')[1].split('"')[0]: row[-1] for row in samples(metrics) if "lateness_seconds_bucket" in row}
    assert (rows["0.0001"], rows["0.003"], rows["0.0035"], rows["0.005"], rows["1.0"], rows["+Inf"]) == tuple("001111")


def test_cpu_seconds_are_those_of_the_process() -> None:
    metrics = WorkerMetrics("m", "decode")

    def shown() -> float:
        return next(float(row.rsplit(" ", 1)[1]) for row in samples(metrics) if row.startswith("pdbench_emulator_cpu_seconds"))

    before = shown()
    while time.process_time() < before + 0.02:
        pass
    assert before + 0.02 <= shown() <= time.process_time()
