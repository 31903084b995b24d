from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdbench.emulate.handshake import Kv, Timeouts
from pdbench.emulate.metrics import Histogram, WorkerMetrics
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
    kv = Kv(prompt_of([1, 2, 3]), 42)
    assert Kv.from_json(kv.to_json()) == kv
    broken: list[object] = [None, [], {}, {"tokens": 1}, {**kv.to_json(), "digest": "xyz"}, {**kv.to_json(), "tokens": None}]
    for bad in broken:
        with pytest.raises(ValueError, match="not a KV message"):
            Kv.from_json(bad)
