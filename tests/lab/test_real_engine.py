"""Real SGLang on two systemd hosts: the KV cache crosses the bridge between them (Mooncake over TCP)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from lab import network
from lab.common import address, load
from lab.controller import Controller, Play, counts, forget, pids, router, sh, until
from lab.test_verbs import HOSTS, left, snapshot
from real.make_tiny_model import KV_BYTES_PER_TOKEN

INPUT_TOKENS, REQUESTS = 1000, 16


@pytest.fixture
def real(pd: Controller) -> Iterator[Controller]:
    """The controller with the inventory of the real engine, on hosts that nothing of ours is on."""
    if not load("h1")["shared"]:
        pytest.skip("no real engine, or no model, that the hosts could share: make test-real")
    forget(pd)
    emulated, pd.inventory = pd.inventory, "tests/lab/inventory-sglang"
    try:
        yield pd
    finally:
        try:
            forget(pd)
        finally:
            pd.inventory = emulated


def complete() -> dict[str, Any]:
    """One request through the router."""
    body = {"model": "tiny", "prompt": "once upon a time", "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    return dict(router("/v1/completions", body))


def received(host: str) -> int:
    """Bytes that have come in by the host's cable."""
    return int(sh(host, "cat /sys/class/net/eth0/statistics/rx_bytes"))


def bench(pd: Controller) -> int:
    """Make a valid run; return the bytes that the decode host received meanwhile.

    Where the machine's cores are busy otherwise the gate rightly refuses a run in which the client was kept from its work;
    that, and nothing else, is tried again.
    """
    load = {"api": "generate", "input_len": INPUT_TOKENS, "output_len": 8, "concurrency": 2, "num_requests": REQUESTS}
    words = [word for name, value in load.items() for word in ("-e", f"bench_{name}={value}")]
    for _ in range(3):
        before = received("h2")
        play = pd.play("bench.yml", *words)
        moved = received("h2") - before
        verdict = pd.result("latest", "validity.json")
        assert verdict["valid"] is (play.code == 0), play.text[-4000:]
        faults = {check["id"] for check in verdict["checks"] if not check["ok"]}
        if not faults:
            return moved
        assert faults <= {"client-loop", "client-on-time", "client-load"}, play.text[-4000:]
    pytest.fail(f"the machine was too busy for a valid run, three times: {faults}")


def a_cut_path_stops_the_deployment(pd: Controller) -> None:
    """Between the prefill and the decode host nothing goes; before an engine starts, that is said."""
    network.partition("h1", "h2")
    play = pd.play("deploy_pd.yml", timeout_s=500).bad()
    network.heal()
    assert f"prefill-0 (h1) {address('h1')} -> decode-0 (h2) {address('h2')}: on h1: " in play.words
    assert f"likely cause: packets from h1 to {address('h2')} are dropped" in play.words
    assert "BROKEN" in play.text
    assert pids() == {}
    for host in ("h1", "h2"):
        assert sh(host, "pgrep -f '[p]robe_tool|[l]aunch_server'; true") == ""


def the_path_was_tried(pd: Controller, play: Play) -> None:
    """Mooncake moved bytes over the bridge, and what it did is kept with the plan."""
    assert "KV path, mooncake_tcp:" in play.text
    record = json.loads((pd.home / "results" / "kv_probe.json").read_text())
    path = record["paths"][0]
    assert (record["ok"], path["prefill"], path["decode"], path["seen"]) == (True, "prefill-0 (h1)", "decode-0 (h2)", "tcp")
    print(f"KV path over the bridge: {path['gb_s']:.2f} GB/s, {path['latency_us']:.0f} us")
    kept = json.loads(sh("h3", "cat /var/lib/pd/plan.json"))["kv_probe"]
    assert [row["gb_s"] for row in kept.values()] == [path["gb_s"]]
    again = pd.play("deploy_pd.yml").good()
    assert "KV path probe: 1 of 1 paths are known" in again.text
    assert set(again.changed.values()) == {0}


def test_the_kv_cache_crosses_the_bridge(real: Controller) -> None:
    pd, before = real, {host: snapshot(host) for host in HOSTS}

    a_cut_path_stops_the_deployment(pd)
    the_path_was_tried(pd, pd.play("deploy_pd.yml", timeout_s=500).good())
    first = pids()
    assert sorted(first) == ["h1/pd-prefill-0.service", "h2/pd-decode-0.service", "h3/pd-router.service"]
    assert counts() == {"prefill": 1, "decode": 1}
    for host, pid in (("h1", first["h1/pd-prefill-0.service"]), ("h2", first["h2/pd-decode-0.service"])):
        assert sh(host, f"stat -c %U /proc/{pid}") == "pd"
        assert "sglang" in sh(host, f"tr '\\0' ' ' < /proc/{pid}/cmdline")
    assert until("a completion", complete)["usage"]["completion_tokens"] == 8

    moved = bench(pd)
    checks = {check["id"]: check for check in pd.result("latest", "validity.json")["checks"]}
    for name in ("kv-failures", "kv-transfer", "kv-bytes"):
        assert checks[name]["ok"] is True, checks[name]
    kv_bytes = REQUESTS * INPUT_TOKENS * KV_BYTES_PER_TOKEN
    print(f"h2 received {moved / 1e6:.1f} MB by its cable; the KV caches of the run's prompts are {kv_bytes / 1e6:.1f} MB")
    assert moved > kv_bytes
    assert [(point["completed"], point["failed"]) for point in pd.result("latest", "summary.json")["points"]] == [(REQUESTS, 0)]
    assert pids() == first

    pd.play("teardown.yml", "-e", "purge=true").good()
    for host in HOSTS:
        assert left(host, before[host]) == {}, host
