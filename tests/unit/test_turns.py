"""Conversations turn by turn."""

from __future__ import annotations

import pytest

from pdbench.gate.rundata import Point
from pdbench.load.requests import Request
from pdbench.records import Record
from pdbench.report.tables import _turns
from pdbench.run.schedule import talks
from pdbench.turns import by_turn


def said(conversation: int, turn: int, ttft: float, e2e: float, ok: bool = True) -> Record:
    r = Record(0, 10 * conversation + turn, "measure", 100 * turn, 5, 0.0, 0.0, ttft, e2e)
    r.chunk_s, r.output_tokens, r.prompt_tokens, r.cached_tokens = [ttft, e2e], 5, 100 * turn, 100 * (turn - 1)
    r.ok, r.conversation, r.turn = ok, conversation, turn
    return r


def test_turns_are_told_apart_and_latency_adds_up() -> None:
    records = [
        said(0, 1, 0.1, 0.5),
        said(0, 2, 0.2, 0.7),
        said(1, 1, 0.3, 1.5),
        said(1, 2, 0.2, 1.0, ok=False),
        said(0, 3, 0.1, 0.1),
    ]
    first, second, third = by_turn(records) or []
    assert (first["turn"], first["completed"], first["failed"]) == (1, 2, 0)
    assert first["ttft_ms"]["mean"] == pytest.approx(200)  # type: ignore[index]
    assert first["cumulative_latency_ms"]["max"] == pytest.approx(1500)  # type: ignore[index]
    assert (second["completed"], second["failed"], second["prompt_tokens"], second["cached_tokens"]) == (1, 1, 200, 100)
    assert (first["kv_tokens"], second["kv_tokens"], third["kv_tokens"]) == (105, 205, 305)
    assert second["cumulative_latency_ms"]["mean"] == pytest.approx(1200)  # type: ignore[index]
    assert second["request_output_throughput"] == pytest.approx(5 / 0.7)
    assert third["cumulative_latency_ms"]["mean"] == pytest.approx(1300)  # type: ignore[index]


def test_without_conversations_there_are_no_turns() -> None:
    r = said(0, 1, 0.1, 0.2)
    r.conversation, r.turn = -1, 0
    assert by_turn([r]) is None
    assert talks([Request(0, 1, 1), Request(1, 1, 1)]) == {}


def test_turns_are_counted_along_the_chain() -> None:
    chain = [Request(0, 1, 1), Request(1, 1, 1), Request(2, 1, 1, after=0), Request(3, 1, 1, after=2)]
    assert talks(chain) == {0: (0, 1), 1: (1, 1), 2: (0, 2), 3: (0, 3)}


def test_a_users_rate_is_told_with_its_wait_and_older_files_are_read() -> None:
    """n / E2E had the name of 1 / TPOT there."""
    (turn,) = by_turn([said(0, 1, 0.2, 0.7)]) or []
    assert "output_throughput_per_user" not in turn
    older = {**turn, "output_throughput_per_user": turn["request_output_throughput"]}
    del older["request_output_throughput"]
    tables = [_turns(Point(0, {"turns": [one], "concurrency": 1}, {}, [])) for one in (turn, older)]
    assert ("tokens/s per user, incl. TTFT", 1) in tables[0].head
    assert tables[0].rows == tables[1].rows
    assert "7.14" in tables[0].rows[0]
