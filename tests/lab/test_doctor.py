"""doctor.yml over SSH: nothing on healthy hosts; a firewall between two, a clock, a disk, a restarted unit, each named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from lab import network
from lab.common import address, namespace, run
from lab.controller import Controller, counts, pids, sh, until

#: An Ansible interpreter of its own on every host, so that one host's modules can see another time.
PYTHON = "/usr/local/bin/pd-test-python"
HOSTS = ("h1", "h2", "h3", "h4")


def findings(pd: Controller) -> dict[str, dict[str, tuple[str, str]]]:
    """What the last doctor.yml wrote: check -> host -> (severity, evidence)."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for row in json.loads((pd.home / "results" / "doctor.json").read_text())["findings"]:
        found.setdefault(row["id"], {})[row["host"]] = (row["severity"], row["evidence"])
    return found


def errors(found: dict[str, dict[str, tuple[str, str]]]) -> set[tuple[str, str]]:
    return {(check, host) for check, rows in found.items() for host, (severity, _) in rows.items() if severity == "error"}


@contextmanager
def firewall(host: str, source: str, port: int) -> Iterator[None]:
    """A host that drops what another sends to one of its ports."""
    rule = f"ip saddr {address(source)} tcp dport {port} drop"
    rules = f"table inet pdtest {{\n chain input {{\n type filter hook input priority 0;\n {rule}\n }}\n}}\n"
    nft = ("ip", "netns", "exec", namespace(host), "nft")
    run(*nft, "-f", "-", input=rules)
    try:
        yield
    finally:
        run(*nft, "delete", "table", "inet", "pdtest")


@contextmanager
def skewed(host: str, seconds: int) -> Iterator[None]:
    """Modules on one host see another time; PYTHON is an ordinary Python on the others."""
    late = f"import time; now = time.time; time.time = lambda: now() + {seconds}"
    python = f'#!/bin/sh\\nexec env PYTHONPATH={PYTHON}.d /usr/bin/python3 "$@"\\n'
    try:
        sh(host, f"mkdir {PYTHON}.d && echo '{late}' > {PYTHON}.d/sitecustomize.py")
        for name in HOSTS:
            sh(name, f"printf '{python}' > {PYTHON} && chmod 755 {PYTHON}")
        yield
    finally:
        for name in HOSTS:
            sh(name, f"rm -rf {PYTHON} {PYTHON}.d")


def test_what_is_wrong_between_and_on_hosts_is_named(serving: Controller) -> None:
    pd = serving
    before = pids()
    well = pd.play("doctor.yml", timeout_s=150).good()
    assert errors(findings(pd)) == set()
    assert {"unit", "router", "pair", "stream", "ports", "versions"} <= set(findings(pd))
    assert all(count == 0 for count in well.changed.values())

    # h1's firewall keeps decode-0 (h2) from prefill-0's bootstrap port; h2's clock is ahead; h4 has a full disk; a unit restarts
    sh("h1", "systemctl kill -s KILL pd-prefill-1")
    sh("h4", "mkdir -p /var/lib/pd && mount -t tmpfs -o size=64m,mode=755 tmpfs /var/lib/pd")
    try:
        until("the router counts all", lambda: "pd-prefill-1" in str(pids()) and counts() == {"prefill": 3, "decode": 1}, 90)
        with firewall("h1", "h2", 8998), skewed("h2", 3600):
            play = pd.play("doctor.yml", "-e", f"ansible_python_interpreter={PYTHON}", timeout_s=150).bad()
    finally:
        sh("h4", "umount -l /var/lib/pd")
    found = findings(pd)
    assert {("ports", "h2 -> h1"), ("pair", "prefill-0 -> decode-0"), ("disk", "h4")} <= errors(found)
    assert {check for check, _ in errors(found)} <= {"ports", "pair", "disk", "kv-failures"}
    assert f"port 8998 (bootstrap of prefill-0) of {address('h1')}: no answer" in found["ports"]["h2 -> h1"][1]
    assert found["clock"]["h2"][0] == "warning"
    assert "36" in found["clock"]["h2"][1]
    assert "ahead of the controller's" in found["clock"]["h2"][1]
    assert {host for host, (severity, _) in found["clock"].items() if severity == "ok"} == {"h1", "h3", "h4"}
    assert "pd-prefill-1 was started anew" in found["restarts"]["h1"][1]
    assert "h2 -> h1" in play.text
    print(f"doctor.yml: {well.seconds:.1f} s on healthy hosts, {play.seconds:.1f} s with a firewall between two")
    assert {name for name, pid in pids().items() if before.get(name) != pid} == {"h1/pd-prefill-1.service"}


def test_a_host_that_is_dark_is_a_finding_and_the_others_are_examined(serving: Controller) -> None:
    pd = serving
    network.partition("controller", "h4")
    try:
        play = pd.play("doctor.yml", timeout_s=150).bad()
    finally:
        network.heal()
    found = findings(pd)
    assert errors(found) == {("host", "h4")}
    assert found["pair"]["all pairs"][0] == "ok"
    assert "Traceback" not in play.text
