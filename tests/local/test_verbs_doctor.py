"""doctor.yml as typed: before a deployment, on a healthy one, and with faults of emulated workers, which it names."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from local.conftest import Checkout, Play

from pdlib.gateway import Gateway
from pdlib.managers import Supervisord

ARGS = ("-e", "ratio=2p1d", "-e", '{"engine_args": {"allow-faults": true}}')

Finding = dict[str, str]


def findings(checkout: Checkout, *words: str) -> tuple[Play, dict[str, list[Finding]]]:
    """Run doctor.yml; return its outcome and its findings by check, those that are well left out."""
    play = checkout.play("doctor.yml", *words)
    assert "Traceback" not in play.text, play.text[-4000:]
    said = json.loads((checkout.folder / "results" / "doctor.json").read_text())
    assert said["ok"] == (play.code == 0), play.text[-4000:]
    found: dict[str, list[Finding]] = {}
    for row in said["findings"]:
        assert set(row) == {"id", "severity", "host", "evidence", "fix"}
        if row["severity"] != "ok":
            assert row["fix"] or row["severity"] == "info", row
            found.setdefault(row["id"], []).append(row)
    return play, found


def errors(found: dict[str, list[Finding]]) -> set[str]:
    return {check for check, rows in found.items() if any(row["severity"] == "error" for row in rows)}


def call(url: str, body: Any = None, method: str = "POST") -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return answer.read()


@pytest.fixture(scope="module")
def plan(checkout: Checkout) -> Iterator[dict[str, Any]]:
    """2p1d of emulated workers that take faults, deployed; nothing after the tests of this module."""
    if checkout.processes():
        checkout.play("teardown.yml").good()
    checkout.play("deploy_pd.yml", *ARGS).good()
    (copy,) = (checkout.folder / ".pd" / "deployed").glob("*.json")
    yield json.loads(copy.read_text())
    checkout.play("teardown.yml").good()


@pytest.fixture
def urls(plan: dict[str, Any]) -> dict[str, str]:
    return {worker["name"]: worker["url"] for worker in plan["workers"]}


def test_before_a_deployment_hosts_alone_are_examined(clean: Checkout) -> None:
    files = clean.files()
    # a limit may leave the router's host out
    dry = clean.play("doctor.yml", "--check", "-l", "gh200").good()
    assert "doctor: " in dry.text
    assert set(dry.changed) == {"gh200"}
    assert clean.files() == files
    play, found = findings(clean)
    play.good()
    assert errors(found) == set()
    assert play.changed == {"gh200": 0, "a100": 0}
    assert "would be deployed" in play.text
    assert not {"unit", "router", "pair"} & set(found)
    assert clean.processes() == []
    assert clean.bound() == set()


def test_a_healthy_deployment_has_no_error(checkout: Checkout, plan: dict[str, Any]) -> None:
    started = time.monotonic()
    before = checkout.pids()
    play, found = findings(checkout)
    play.good()
    # about ten seconds on an idle machine; others may use this one
    assert time.monotonic() - started < 60
    assert errors(found) == set()
    assert checkout.pids() == before
    good = {row["id"] for row in json.loads((checkout.folder / "results/doctor.json").read_text())["findings"]}
    assert {"unit", "router", "worker-health", "membership", "bootstrap-port", "pair", "stream", "ports", "transport"} <= good
    assert "wildcard" in good - set(found)
    assert "2 of 2 serve" in play.text


def test_what_was_left_switched_on_is_named_with_what_switches_it_off(
    checkout: Checkout, plan: dict[str, Any], urls: dict[str, str]
) -> None:
    call(f"{urls['prefill-0']}/slow_down", {"forward_sleep_time": 0.05})
    call(f"{urls['prefill-1']}/start_profile", {"output_dir": str(checkout.folder / ".pd" / "profile")})
    call(f"{urls['decode-0']}/emulated/fault", {"kind": "empty_first_chunk"})
    # a transfer that fails once, and is counted
    call(f"{urls['prefill-1']}/emulated/fault", {"kind": "fail_transfer", "count": 1})
    pairs = Gateway(plan["router"]["url"], None).probe_pairs(plan, 20)
    assert [pair["prefill"] for pair in pairs if pair["error"]] == ["prefill-1"]
    try:
        _, found = findings(checkout)
    finally:
        call(f"{urls['prefill-0']}/slow_down", {"forward_sleep_time": None})
        call(f"{urls['prefill-1']}/stop_profile", {})
        for url in urls.values():
            call(f"{url}/emulated/fault", {"kind": "clear"})
    assert errors(found) == {"slow-down", "profiler"}
    (slow,) = found["slow-down"]
    assert slow["host"] == "prefill-0"
    assert f"{urls['prefill-0']}/slow_down" in slow["fix"]
    assert [row["host"] for row in found["profiler"]] == ["prefill-1"]
    assert "without a token" in found["stream"][0]["evidence"]
    assert {row["severity"] for row in [*found["kv-failures"], *found["kv-log"]]} == {"warning"}
    assert "prefill-1" in {row["host"] for row in found["kv-failures"]}


def test_a_dead_worker_a_wrong_bootstrap_port_and_a_pair_that_fails(
    checkout: Checkout, plan: dict[str, Any], urls: dict[str, str]
) -> None:
    # the router is told a wrong bootstrap port of prefill-1, and prefill-0 fails every transfer
    listed = json.loads(call(f"{checkout.url}/workers", method="GET"))["workers"]
    (row,) = (row for row in listed if row["url"].rstrip("/") == urls["prefill-1"])
    call(f"{checkout.url}/workers/{row['id']}", method="DELETE")
    call(f"{checkout.url}/workers", {"url": urls["prefill-1"], "worker_type": "prefill", "bootstrap_port": 1})
    call(f"{urls['prefill-0']}/emulated/fault", {"kind": "fail_transfer"})
    end = time.monotonic() + 30
    while len(checkout.members()) < 3 and time.monotonic() < end:
        time.sleep(0.2)
    try:
        _, found = findings(checkout)
        assert {"bootstrap-port", "pair"} <= errors(found)
        assert "names bootstrap port 1" in found["bootstrap-port"][0]["evidence"]
        assert [row["host"] for row in found["pair"]] == ["prefill-0 -> decode-0"]
    finally:
        call(f"{urls['prefill-0']}/emulated/fault", {"kind": "clear"})
    # the decode worker ends, and a deploy would not be needed to know
    manager = checkout.state(next(w for w in plan["workers"] if w["name"] == "decode-0")["ranks"][0]["host"])
    stop(manager, "pd-decode-0")
    play, found = findings(checkout)
    assert {"unit", "worker-health"} <= errors(found)
    assert "pd-decode-0 is stopped" in found["unit"][0]["evidence"]
    assert found["worker-health"][0]["host"] == "decode-0"
    assert all("decode-0 not healthy" in row["evidence"] for row in found["pair"])
    assert "doctor: " in play.text
    assert "FAILED" in play.text
    # deploy_pd.yml, which the findings name, puts all of it right
    assert "deploy_pd.yml" in found["unit"][0]["fix"]
    again = checkout.play("deploy_pd.yml", *ARGS).good()
    assert "2 of 2 prefill-decode pairs serve" in again.text


def stop(state_dir: Any, unit: str) -> None:
    """Stop a unit as an operator would."""
    manager = Supervisord(str(state_dir), "", "")
    manager.stop([unit])
    end = time.monotonic() + 30
    while manager.status()[unit].state != "stopped" and time.monotonic() < end:
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("-e", "ratoi=3p1d"), "there is no variable ratoi; did you mean ratio?"),
        (("-l", "gh20"), "Could not match supplied host pattern"),
    ],
)
def test_bad_input_is_refused_before_a_host_is_touched(checkout: Checkout, words: tuple[str, ...], what: str) -> None:
    failed = checkout.play("doctor.yml", *words)
    assert failed.code != 0
    assert what in " ".join(failed.text.split())
    assert "Traceback" not in failed.text
    assert "What the hosts have" not in failed.text
