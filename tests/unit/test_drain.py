"""When a worker has nothing left to do, and when its role changes: by what the emulated engine and SGLang say of themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlib import drain, role_switch
from pdlib.errors import UserError


def loads(running: int = 0, waiting: int = 0, sending: int = 0, **more: Any) -> str:
    load: dict[str, Any] = {"dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": waiting}
    load["disaggregation"] = {"mode": "prefill", "prefill_inflight_queue_reqs": sending, **more}
    return json.dumps({"loads": [load]})


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=4))
def test_requests_of_all_ranks_count(ranks: list[tuple[int, int, int]]) -> None:
    answer = {"loads": [json.loads(loads(*rank))["loads"][0] for rank in ranks]}
    assert sum(drain.of_loads(answer).values()) == sum(sum(rank) for rank in ranks)


def test_gauges_of_either_engine_are_read_where_there_is_no_v1_loads() -> None:
    text = (
        'sglang:num_running_reqs{tp_rank="0"} 2.0\nsglang:num_prefill_inflight_queue_reqs{a="b"} 1.0\nsglang:cache_hit_rate 0.5\n'
    )
    answers = {"/v1/loads": (404, ""), "/metrics": (200, text)}
    assert drain.under_way("http://w", lambda m, url: answers[url.split("w", 1)[1].split("?")[0]]) == (
        {"running": 2, "sending KV": 1},
        "",
    )
    assert drain.of_metrics("vllm:num_requests_running 3.0\n") == {"running": 3}
    assert drain.of_metrics("process_cpu_seconds_total 1.0\n") is None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "STEP_S", 0.5)
    monkeypatch.setattr(drain, "QUIET_S", 0.4)
    monkeypatch.setattr(drain, "SILENT_S", 0.5)


def test_it_is_drained_once_it_was_idle_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "STEP_S", 10.0)
    left = [loads(2, 1), loads(0, 0, 1), loads(), loads(1)]

    def ask(method: str, url: str) -> tuple[int, str]:
        return 200, left.pop(0) if left else loads()

    assert drain.wait({"prefill-1": "http://w"}, ask).done
    assert left == [], "one that had been idle for a moment only was asked again"


def test_what_is_left_is_said() -> None:
    outcome = drain.wait({"decode-1": "http://w"}, lambda method, url: (200, loads(3)))
    assert not outcome.done
    assert outcome.message == "out of the router, and still at work: decode-1 (3 running)"


def test_a_process_that_is_gone_has_no_requests_and_one_that_is_silent_is_named() -> None:
    assert drain.wait({"decode-1": "http://w"}, lambda method, url: (0, "[Errno 111] Connection refused")).done
    with pytest.raises(UserError, match=r"decode-1 at http://w left the router and does not say .*timed out.* The others serve"):
        drain.wait({"decode-1": "http://w"}, lambda method, url: (0, "timed out"))
    with pytest.raises(UserError, match="neither /v1/loads nor /metrics counts"):
        drain.wait({"decode-1": "http://w"}, lambda method, url: (404, ""))


class Switching:
    """A worker that changes its role when it is idle, and a decode worker beside it."""

    def __init__(self, refuses: str = "") -> None:
        self.mode, self.refuses, self.asked = "prefill", refuses, list[dict[str, Any]]()

    def __call__(self, method: str, url: str, body: dict[str, Any] | None) -> tuple[int, str]:
        if url.startswith("http://peer"):
            return 200, json.dumps({"loads": [{"memory": {"graph_gb": 1.25}}]})
        if method == "GET":
            return 200, loads(mode=self.mode)
        assert body
        self.asked.append(body)
        if self.refuses:
            return 400, json.dumps({"success": False, "message": self.refuses})
        self.mode = body["new_role"]
        return 200, json.dumps({"success": True})


SWITCH = {"url": "http://w", "role": "decode", "decode_peers": ["http://peer"]}


def test_a_role_is_switched_once_with_what_a_decode_worker_s_graphs_take() -> None:
    worker = Switching()
    assert role_switch.bring("pd-worker-1", SWITCH, worker) == (True, "switched pd-worker-1 from prefill to decode")
    assert role_switch.bring("pd-worker-1", SWITCH, worker) == (True, "")
    assert worker.asked == [{"new_role": "decode", "decode_cuda_graph_memory_gb": 1.25}]


def test_a_worker_with_requests_is_waited_for_and_another_refusal_is_an_error() -> None:
    busy = Switching("instance is not idle; drain all requests before switching")
    assert role_switch.bring("pd-worker-1", SWITCH, busy) == (False, "pd-worker-1 has requests left before it becomes decode")
    with pytest.raises(UserError, match=r"does not become decode while it runs .*nixl.* does not support"):
        role_switch.bring("pd-worker-1", SWITCH, Switching("transfer backend 'nixl' does not support runtime role switch"))
    silent = role_switch.bring("pd-worker-1", SWITCH, lambda method, url, body: (0, "timed out"))
    assert silent == (False, "pd-worker-1 does not say what its role is")
