"""A run's manifest runs the same again."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from unit.plans import KEY, host, inputs, make_plan

from pdlib import manifest, settings
from pdlib.variables import BENCH, CLUSTER, VARIABLES

CHANGES: dict[str, Any] = {
    "ratio": "2p1d",
    "model": "a/b",
    "bench_concurrency": [8, 16],
    "bench_request_rate": [4, 8.5],
    "bench_seed": 7,
    "bench_input_len": "32-64",
    "router_args": {"request-timeout-secs": 60},
    "bench_slo_ttft_ms": 100.0,
    "router_policy": "random",
    "tensor_parallel_size": 2,
    "run_label": "a label",
}


def cluster_of(made: dict[str, Any], inventory: dict[str, Any]) -> dict[str, Any]:
    """What the deployment's settings are with ``made`` given as extra-vars on top of an inventory."""
    settings.check_extra_vars(made)
    values = settings.host_settings("n1", {"engine": "emulated", **inventory, **made}, made)
    return settings.cluster_settings({"n1": values})


@given(st.sets(st.sampled_from(sorted(CHANGES))), st.sets(st.sampled_from(sorted(CHANGES))))
def test_a_manifest_as_extra_vars_gives_the_same_settings(chosen: set[str], elsewhere: set[str]) -> None:
    """Also when the inventory has changed since: what the run had wins."""
    given_in = inputs({"n1": host(1, gpus=8)}, **{"ratio": "1p1d", **{name: CHANGES[name] for name in chosen}})
    plan = make_plan(given_in)
    ran = {**given_in.cluster, "engine_version": plan["engine_version"]}
    made = manifest.make(plan, given_in.cluster, {"git": "abc"})
    made = json.loads(json.dumps(made))
    again = cluster_of(made, {name: CHANGES[name] for name in elsewhere})
    for name, row in VARIABLES.items():
        if row.scope in (CLUSTER, BENCH) and not row.secret:
            assert again[name] == ran[name], name
    if "run_label" in chosen:
        assert again["run_label"] == "a label"
    assert made["manifest"] == {"git": "abc"}


def test_no_secret_is_in_it() -> None:
    given_in = inputs({"n1": host(1)}, api_key=KEY)
    made = manifest.make(make_plan(given_in), given_in.cluster, {})
    assert KEY not in json.dumps(made)
    assert "api_key" not in made


def test_overrides_of_hosts_are_in_it() -> None:
    given_in = inputs({"n1": host(1)})
    made_plan = {**make_plan(given_in), "overrides": {"mem_fraction": 0.5}}
    assert manifest.make(made_plan, given_in.cluster, {})["mem_fraction"] == 0.5
