"""Least privilege on real hosts: what the login user may, who runs what, and how exposed each unit is (docs/security.md)."""

from __future__ import annotations

import json
import re

from lab import base
from lab.controller import Controller, sh, ssh, units
from lab.test_faults import benching, finish, steady
from unit.test_systemd import recorded

SERVING = ("h1", "h2", "h3")


def exposure(host: str, unit: str) -> float:
    """What systemd says of a unit that is loaded."""
    said = sh(host, f"systemd-analyze security --no-pager {unit}")
    found = re.search(r"exposure level for \S+: ([\d.]+)", said)
    assert found, said
    return float(found[1])


def test_the_login_user_becomes_root_by_one_program_and_nobody_else() -> None:
    assert sh("h1", f"cat /etc/sudoers.d/{base.USER}; visudo -c >/dev/null && echo good").splitlines()[-1] == "good"
    assert ssh("h1", "id -Gn").stdout.split() == [base.USER]
    assert ssh("h1", "sudo -n /bin/sh -c 'id -un'").stdout == "root\n"
    for other in ("sudo -n id", "sudo -n /bin/bash -c id", "sudo -n -u nobody /bin/sh -c id", "sudo -n FOO=1 /bin/sh -c id"):
        refused = ssh("h1", other)
        assert refused.returncode != 0, (other, refused.stdout)
        assert "uid=" not in refused.stdout


def test_a_deployment_has_no_more_rights_than_it_needs(serving: Controller) -> None:
    # the verbs went through that sudoers file, and the journal has each time
    assert "COMMAND=/bin/sh -c" in sh("h1", "journalctl -t sudo -n 50 --no-pager -o cat")
    limit = recorded()["workers and router"]
    plan = json.loads(sh("h3", "cat /var/lib/pd/plan.json"))
    for host in SERVING:
        for name, row in units(host).items():
            assert exposure(host, name) <= limit + 0.05, (host, name)
            process = f"/proc/{row['MainPID']}"
            assert sh(host, f"stat -c %U {process}") == plan["hosts"][host]["service_user"]
            status = dict(line.split(":\t", 1) for line in sh(host, f"cat {process}/status").splitlines() if ":\t" in line)
            assert {status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}, (host, name)
            assert status["NoNewPrivs"] == "1"


def test_the_load_generator_is_confined_while_it_measures(serving: Controller) -> None:
    with benching(serving, *steady(20)) as (process, run_id):
        seen = exposure("h4", f"pd-bench-{run_id}.service")
        play = finish(process)
    play.good()
    assert seen <= recorded()["the load generator"] + 0.05
    assert serving.result(run_id, "validity.json")["valid"] is True
