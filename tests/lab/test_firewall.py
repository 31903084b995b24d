"""firewall: true on real hosts: who has business at a port reaches it, a stranger does not, and SSH is as it was."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from lab import network
from lab.common import CONTROLLER, SWITCH, address, leader
from lab.controller import LOAD, Controller, asking, complete, counts, pids, reaches, sh, ssh, until
from lab.test_doctor import errors, findings

SERVING = ("h1", "h2", "h3")
HTTP, BOOTSTRAP, ROUTER, METRICS, SSH = 30000, 8998, 8000, 29000, 22
#: The controller is no host of the plan: it is let in at the router because it is named.
WALL = ("-e", "ratio=1p1d", "-e", "firewall=true", "-e", f"firewall_clients={CONTROLLER}")
UNIT = "/etc/systemd/system/pd-firewall.service"


@pytest.fixture(scope="module")
def walled(pd: Controller) -> Iterator[Controller]:
    """The controller with 1p1d behind a firewall: prefill on h1, decode on h2, the router on h3, the client on h4."""
    pd.play("teardown.yml").good()
    foretold = pd.play("deploy_pd.yml", *WALL, "--check", "--diff").good()
    assert foretold.words.count("would load the firewall") == len(SERVING)
    assert "tcp dport" in foretold.text
    assert [table(host) for host in SERVING] == [""] * len(SERVING)
    pd.play("deploy_pd.yml", *WALL).good()
    try:
        yield pd
    finally:
        pd.play("teardown.yml").good()


def table(host: str) -> str:
    """The table as the kernel of a host has it, "" where there is none."""
    return sh(host, "nft list table inet pd 2>/dev/null", check=False)


def knock(host: str, *ports: int) -> list[int]:
    """The ports of a host that take a connection from the controller's end of the bridge."""

    def one(port: int) -> bool:
        try:
            socket.create_connection((address(host), port), 2).close()
        except OSError:
            return False
        return True

    return [port for port in ports if network.inside(SWITCH, lambda port=port: one(port))]  # type: ignore[misc]


def test_it_serves_and_a_stranger_reaches_nothing_but_ssh(walled: Controller) -> None:
    served = [name for name in sorted(pids()) if not name.endswith("/pd-firewall.service")]
    assert served == ["h1/pd-prefill-0.service", "h2/pd-decode-0.service", "h3/pd-router.service"]
    assert counts() == {"prefill": 1, "decode": 1}
    assert complete()["usage"]["completion_tokens"] == 8
    # the controller is in no plan; it listens there, as the hosts themselves see
    assert "30000" in sh("h1", "ss -Hltn")
    assert knock("h1", HTTP, BOOTSTRAP, SSH) == [SSH]
    assert knock("h2", HTTP, SSH) == [SSH]
    assert knock("h3", ROUTER, METRICS, SSH) == [ROUTER, SSH]
    assert ssh("h1", "hostname").stdout == "h1\n"
    # decode's host, the router's, the client's: each where it has business
    every = [("h1", HTTP), ("h1", BOOTSTRAP), ("h2", HTTP), ("h3", ROUTER), ("h3", METRICS)]
    seen = {
        source: [(host, port) for host, port in every if source != host and reaches(source, host, port)]
        for source in ("h2", "h3", "h4")
    }
    assert seen == {
        "h2": [("h1", HTTP), ("h1", BOOTSTRAP)],
        "h3": [("h1", HTTP), ("h2", HTTP)],
        "h4": [("h1", HTTP), ("h2", HTTP), ("h3", ROUTER), ("h3", METRICS)],
    }
    assert "packets" in table("h1"), "what is dropped is counted"


def test_a_second_deploy_changes_nothing_and_a_run_is_valid(walled: Controller) -> None:
    assert all(table(host) for host in SERVING)
    for words in ((), ("--check",)):
        again = walled.play("deploy_pd.yml", *WALL, *words).good()
        assert set(again.changed.values()) == {0}, again.text[-3000:]
    walled.play("bench.yml", *LOAD).good()
    assert walled.result("latest", "validity.json")["valid"] is True


def test_doctor_names_a_table_that_is_gone_and_a_deploy_brings_it_back(walled: Controller) -> None:
    walled.play("doctor.yml", timeout_s=150).good()
    found = findings(walled)
    assert errors(found) == set()
    assert found["exposure"]["between hosts"][0] == "ok"
    assert {severity for severity, _ in found["wildcard"].values()} == {"ok"}
    sh("h1", "nft delete table inet pd")
    walled.play("doctor.yml", timeout_s=150).bad()
    found = findings(walled)
    assert errors(found) == {("exposure", "h1")}
    assert "which the plan does not let in" in found["exposure"]["h1"][1]
    mended = walled.play("deploy_pd.yml", *WALL).good()
    assert {host for host, count in mended.changed.items() if count} == {"h1"}
    assert knock("h1", HTTP, BOOTSTRAP) == []


def test_it_is_there_again_after_a_reboot_and_after_nftables_was_flushed(walled: Controller) -> None:
    boot = "cat /proc/sys/kernel/random/boot_id"
    before = sh("h1", boot)
    # a host of the lab keeps its network namespace, and with it the table, over a reboot
    sh("h1", "nft delete table inet pd")
    ssh("h1", "sudo /bin/sh -c 'systemctl reboot'")
    until("h1 has another boot id", lambda: leader("h1") and sh("h1", boot, check=False) not in ("", before))
    network.wait_ssh(["h1"])
    until("the router counts both", lambda: counts() == {"prefill": 1, "decode": 1}, 120)
    assert knock("h1", HTTP, BOOTSTRAP, SSH) == [SSH]
    assert reaches("h2", "h1", BOOTSTRAP)
    assert "loaded the firewall" not in walled.play("deploy_pd.yml", *WALL).good().words
    # Debian's own service begins with `flush ruleset`
    sh("h1", "systemctl start nftables && systemctl restart nftables")
    try:
        # systemctl waits for nftables.service, not for ours, which starts after it
        until("the rules are back", lambda: table("h1"))
        assert knock("h1", HTTP, BOOTSTRAP, SSH) == [SSH]
    finally:
        # stopped, it takes ours along: whoever stops it wants no rules
        sh("h1", "systemctl stop nftables")
    assert table("h1") == ""
    assert walled.play("deploy_pd.yml", *WALL).good().words.count("loaded the firewall") == 1
    assert knock("h1", HTTP, BOOTSTRAP, SSH) == [SSH]


def test_a_ratio_that_brings_a_host_lets_it_in_first_and_out_at_last(walled: Controller) -> None:
    assert not reaches("h3", "h1", BOOTSTRAP)
    with asking() as asked:
        walled.play("rebalance.yml", "-e", "ratio=1p3d").good()
    assert asked.lost == []
    assert asked.good > 10
    assert "h3/pd-decode-2.service" in pids()
    assert reaches("h3", "h1", BOOTSTRAP)
    plan = json.loads(sh("h3", "cat /var/lib/pd/plan.json"))
    assert "firewall" in plan
    walled.play("deploy_pd.yml", *WALL).good()
    assert not reaches("h3", "h1", BOOTSTRAP)
    assert complete()["usage"]["completion_tokens"] == 8


def test_it_goes_when_it_is_no_longer_wanted_and_with_a_teardown(walled: Controller) -> None:
    walled.play("deploy_pd.yml", "-e", "ratio=1p1d").good()
    assert [table(host) for host in SERVING] == [""] * len(SERVING)
    assert knock("h1", HTTP, BOOTSTRAP) == [HTTP, BOOTSTRAP]
    assert set(walled.play("deploy_pd.yml", "-e", "ratio=1p1d").good().changed.values()) == {0}
    walled.play("deploy_pd.yml", *WALL).good()
    assert all(table(host) for host in SERVING)
    walled.play("teardown.yml").good()
    for host in SERVING:
        assert table(host) == ""
        assert sh(host, f"ls {UNIT} /etc/systemd/system/*/pd-firewall.service /var/lib/pd 2>/dev/null; true") == ""
        assert "pd-firewall" not in sh(host, "systemctl list-units --all --plain --no-legend")


def test_a_host_without_nft_says_what_to_install_before_anything_changes(pd: Controller) -> None:
    pd.play("teardown.yml").good()
    nft = sh("h1", "command -v nft")
    sh("h1", f"mv {nft} {nft}.away")
    try:
        refused = pd.play("deploy_pd.yml", *WALL).bad()
    finally:
        sh("h1", f"mv {nft}.away {nft}")
    assert "host h1: firewall: true needs nft, which it has not: apt-get install nftables" in refused.words
    assert [table(host) for host in SERVING] == [""] * len(SERVING)
    assert pids() == {}
    pd.play("teardown.yml").good()
