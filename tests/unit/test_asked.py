"""What makes two load points the same load."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest

from pdbench.advise import check
from pdbench.sweep import asked, tidy

OPEN = {"request_rate": 5.0, "concurrency": None, "isl": "64", "osl": "8", "num_requests": 287}
ROW = {
    "ratio": "1p1d", "gpus": 2, "request_rate": 5.0, "isl": 64.0, "osl": 8.0, "completed": 20, "valid": True,
    "output_throughput": 1.0, "ttft_ms_p50": 1.0,
}  # fmt: skip


def test_runs_of_a_duration_are_one_load_however_many_requests_were_drawn() -> None:
    """Older summaries do not say the duration, but the manifest beside them does."""
    old = asked.of(OPEN, {}, {"bench_duration": 60})
    assert old == asked.of({**OPEN, "num_requests": 311}, {}, {"bench_duration": 60})
    assert old == asked.of({**OPEN, "num_requests": 302, "duration": 60.0}, {}, {"bench_duration": 60})
    assert old != asked.of({**OPEN, "num_requests": 302, "duration": 30.0}, {}, {"bench_duration": 30})
    closed = {**OPEN, "request_rate": None, "concurrency": 4}
    assert json.loads(asked.of(closed, {}, {"bench_duration": 60}))["num_requests"] == 287


def of_table(**said: Any) -> pd.Series:
    return tidy.frame([{**ROW, "asked": json.dumps(said)}]).assign(folder="", point=0).iloc[0]


@pytest.mark.parametrize("name", ["shared_prefix", "conversation", "request_rate_to", "trace"])
def test_a_table_s_load_that_its_figures_do_not_tell_is_not_simulated(name: str) -> None:
    with pytest.raises(ValueError, match=name.replace("_", " ")):
        check.work_of(of_table(**{name: True}).to_dict())


def test_a_table_s_load_is_simulated_with_its_own_arrivals() -> None:
    due = [prompt.due for prompt in check.work_of(of_table(arrival="constant").to_dict()).prompts]
    assert due == pytest.approx([0.2 * number for number in range(20)])
