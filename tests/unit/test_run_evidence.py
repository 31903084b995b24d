"""Prometheus pages and plans, as far as the evidence needs them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pdbench.evidence import parse_metrics, read_plan, write_metrics
from pdbench.load.errors import LoadError

PAGE = """# HELP sglang:prompt_tokens_total Tokens.
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="a b",x="}"} 12.0
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs 3 1700000000000
# TYPE lat histogram
lat_bucket{le="1"} 4
lat_bucket{le="+Inf"} 5
lat_sum{q="1"} 7.5
lat_count{q="1"} 5
# TYPE gc summary
gc{quantile="0.5"} 1
gc_sum 2
prompt_tokens_created 1.7e9
untyped_thing 1e3
odd NaN
infinite +Inf
not a sample
"""


def test_a_page_keeps_what_counts() -> None:
    assert parse_metrics(PAGE) == {
        'sglang:prompt_tokens_total{model_name="a b",x="}"}': 12.0,
        "sglang:num_running_reqs": 3.0,
        'lat_sum{q="1"}': 7.5,
        'lat_count{q="1"}': 5.0,
        "gc_sum": 2.0,
        "untyped_thing": 1000.0,
    }
    assert parse_metrics("") == {}


def plan(**more: object) -> dict[str, object]:
    ranks = [{"host": "n1", "gpus": [0, 1]}]
    return {
        "ratio": "1p1d",
        "workers": [
            {"name": "prefill-0", "url": "http://127.0.0.1:1/", "ranks": ranks},
            {
                "name": "decode-0",
                "url": "http://127.0.0.1:2",
                "ranks": [{"host": "n1", "gpus": [1]}, {"host": "n2", "gpus": [0]}],
            },
        ],
        "router": {"url": "http://127.0.0.1:3", "metrics_url": "http://127.0.0.1:4/metrics"},
        **more,
    }


def test_a_plan_counts_every_gpu_once(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan()))
    found = read_plan(path)
    assert (found.ratio, found.gpus, found.router_url) == ("1p1d", 3, "http://127.0.0.1:3")
    assert found.workers == {"prefill-0": "http://127.0.0.1:1", "decode-0": "http://127.0.0.1:2"}
    assert found.router_metrics_url == "http://127.0.0.1:4/metrics"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"workers": [{}]}', json.dumps({**plan(), "router": None})])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(LoadError, match=r"is no plan\.json"):
        read_plan(path)
    with pytest.raises(LoadError, match="cannot read the plan"):
        read_plan(tmp_path / "none")


@pytest.mark.parametrize("rows", [[], [(0, 1.5, "router", "up", 'a="b"', 1.0), (1, 2.5, "decode-0", "n", "", 3.0)]])
def test_scrapes_become_rows(tmp_path: Path, rows: list[tuple[int, float, str, str, str, float]]) -> None:
    write_metrics(tmp_path / "m.parquet", rows)
    table = pq.read_table(tmp_path / "m.parquet")
    assert table.column_names == ["point", "t_s", "source", "name", "labels", "value"]
    assert [tuple(row.values()) for row in table.to_pylist()] == rows
