"""Every verb over SSH on systemd hosts that reach no registry, as an ordinary user with sudo; the load comes from h4."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from lab import network
from lab.common import address
from lab.controller import LOAD, Controller, asking, complete, counts, forget, pids, sh, units

SERVING = ("h1", "h2", "h3")
HOSTS = (*SERVING, "h4")
#: What hosts do by themselves.
NOISE = ("/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/log", "/var/lib/systemd", "/var/cache", "/home/ops/.ansible")
USUAL = ("ps ", "bash ", "sshd", "[", "(", "/lib/systemd", "/usr/lib/systemd", "/usr/bin/dbus-daemon")


@pytest.fixture
def fresh(pd: Controller) -> Controller:
    """The controller with hosts that nothing of ours was ever on."""
    forget(pd)
    return pd


def snapshot(host: str) -> dict[str, set[str]]:
    """Everything on a host that a deploy could leave behind."""
    prune = " -o ".join(f"-path {path}" for path in NOISE)
    files = sh(host, f"find / -xdev \\( {prune} -o -name '*.pyc' -o -name __pycache__ -o -path '/etc/*-' \\) -prune -o -print")
    return {
        "files": set(files.splitlines()),
        "in /tmp": set(sh(host, "find /tmp /var/tmp /dev/shm -mindepth 1 -not -path '*systemd-private*'").splitlines()),
        "accounts": set(sh(host, "cut -d: -f1 /etc/passwd /etc/group").splitlines()),
        "units": set(sh(host, "systemctl list-unit-files --no-legend --plain | grep -v ^session- | cut -d' ' -f1").splitlines()),
        "failed": set(sh(host, "systemctl list-units --failed --no-legend --plain").splitlines()),
        "ports": set(sh(host, "ss -Hltn | awk '{print $4}'").splitlines()),
        "programs": {row for row in sh(host, "ps -eo args=").splitlines() if not row.startswith(USUAL)},
    }


def left(host: str, before: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is on the host that was not there before."""
    return {kind: new for kind, now in snapshot(host).items() if (new := now - before[kind])}


def test_from_a_dry_run_to_a_second_deployment(fresh: Controller) -> None:
    pd = fresh
    before = {host: snapshot(host) for host in HOSTS}

    # a dry run on fresh hosts foretells, fails at nothing and leaves nothing
    foretold = pd.play("deploy_pd.yml", "--check", "--diff").good()
    for name in ("prefill-0", "prefill-1", "prefill-2", "decode-0", "router"):
        assert re.search(rf"would start [^;\n]*pd-{name}", foretold.text), name
    assert all(foretold.changed[host] > 0 for host in SERVING)
    assert {host: left(host, before[host]) for host in HOSTS} == {host: {} for host in HOSTS}

    pd.play("deploy_pd.yml").good()
    check_running_state(pd, "3p1d")
    first = pids()
    assert sorted(first) == [
        "h1/pd-prefill-0.service", "h1/pd-prefill-1.service", "h2/pd-decode-0.service",
        "h3/pd-prefill-2.service", "h3/pd-router.service",
    ]  # fmt: skip

    # the second deploy changes nothing, and a dry run says so
    for words in ((), ("--check",)):
        again = pd.play("deploy_pd.yml", *words).good()
        assert set(again.changed.values()) == {0}, again.text[-3000:]
    assert pids() == first

    # another ratio moves the fewest workers, and the router goes on running
    pd.play("deploy_pd.yml", "-e", "ratio=2p2d").good()
    second = pids()
    check_running_state(pd, "2p2d")
    assert len(second) == 5
    assert {name: pid for name, pid in second.items() if name in first} == {
        name: pid for name, pid in first.items() if name in second
    }

    # the load comes from h4; its records end on the controller, and only there
    pd.play("bench.yml", *LOAD).good()
    run = pd.home / "results" / "latest"
    for name in ("manifest.json", "plan.json", "requests.parquet", "summary.json", "validity.json", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert pd.result("latest", "validity.json")["valid"] is True
    assert pd.result("latest", "plan.json")["ratio"] == "2p2d"
    summary = pd.result("latest", "summary.json")
    assert [(point["completed"], point["failed"]) for point in summary["points"]] == [(24, 0)]
    logs = {name.replace("/", "-").replace(".service", ".log") for name in second}
    # what was logged before the last start (systemd's own lines at least) lies beside it
    assert {path.name for path in (run / "logs").iterdir()} - {log.replace(".log", ".before.log") for log in logs} == logs
    assert sh("h4", "ls /var/lib/pd/runs") == ""
    assert pids() == second

    # gone: no unit, process, port or file but what docs/hosts.md says stays (installs, and who ran them)
    pd.play("teardown.yml").good()
    for host in HOSTS:
        stays = left(host, before[host])
        files = {name for name in stays.pop("files", set()) if not f"{name}/".startswith(("/opt/pd/", "/var/lib/pd-home/"))}
        assert files == set(), host
        assert stays.pop("accounts", set()) <= {"pd"}
        assert stays == {}, host
    assert sh("h1", "runuser -u ops -- ls -A /home/ops/.ansible/tmp 2>/dev/null") == ""

    # and again, from the installs that stayed
    pd.play("deploy_pd.yml").good()
    check_running_state(pd, "3p1d")

    # purge leaves nothing at all
    pd.play("teardown.yml", "-e", "purge=true").good()
    assert {host: left(host, before[host]) for host in HOSTS} == {host: {} for host in HOSTS}


def check_running_state(pd: Controller, ratio: str) -> None:
    """What runs, not what was written: processes, their users, arguments and environment, and the router's own count."""
    plan = json.loads(sh("h3", "cat /var/lib/pd/plan.json"))
    assert plan["ratio"] == ratio
    wanted = {(rank["host"], rank["unit"]): rank for worker in plan["workers"] for rank in worker["ranks"]}
    wanted[plan["router"]["host"], plan["router"]["unit"]] = plan["router"]
    seen = {(host, name): row for host in HOSTS for name, row in units(host).items()}
    assert set(seen) == set(wanted)
    for (host, name), entry in wanted.items():
        row = seen[host, name]
        assert (row["ActiveState"], row["SubState"], row["NRestarts"]) == ("active", "running", "0"), (host, row)
        assert row["UnitFileState"] == "enabled", (host, row)
        process = f"/proc/{row['MainPID']}"
        assert sh(host, f"stat -c %U {process}") == plan["hosts"][host]["service_user"]
        assert sh(host, f"readlink {process}/cwd") == f"/var/lib/pd/run/{name[:-8]}"
        environment = sh(host, f"tr '\\0' '\\n' < {process}/environ").splitlines()
        assert {f"{key}={value}" for key, value in entry["env"].items()} <= set(environment)
        started = re.search(r"argv\[\]=(.*?) ; ", row["ExecStart"])
        assert started
        assert started[1].split() == entry["argv"], (host, name)
        if entry is not plan["router"]:  # the real router overwrites its command line with a title
            assert sh(host, f"tr '\\0' '\\n' < {process}/cmdline").splitlines() == entry["argv"], (host, name)
    roles = [worker["role"] for worker in plan["workers"]]
    assert counts() == {role: roles.count(role) for role in set(roles)}
    assert complete()["usage"]["completion_tokens"] == 8


def test_through_a_jump_host(serving: Controller) -> None:
    """h1 is cut off from the controller, and reached through h4 (docs/hosts.md)."""
    pd = serving
    network.partition("h1", "controller")
    config = pd.folder / "ssh_config"
    config.write_text(f"Host h1 {address('h1')}\n  ProxyJump h4\n  ProxyUseFdpass no\n\n" + pd.ssh_config.read_text())
    direct, pd.ssh_config = pd.ssh_config, config
    before = pids()
    pd.env["ANSIBLE_SSH_CONTROL_PATH_DIR"] = str(pd.folder / "cp" / "jump")  # no connection from before the cut
    try:
        again = pd.play("deploy_pd.yml").good()
    finally:
        pd.ssh_config = direct
        pd.env["ANSIBLE_SSH_CONTROL_PATH_DIR"] = str(pd.folder / "cp")
    assert set(again.changed.values()) == {0}
    assert pids() == before


def test_one_host_is_changed_while_the_others_serve(serving: Controller) -> None:
    """A limit (the router's host is always in it) and a change on h1: its workers alone restart, the others serve."""
    pd, before = serving, pids()
    own = pd.home / "tests/lab/inventory/host_vars"
    own.mkdir()
    (own / "h1.yml").write_text("engine_env: {PD_LAB: changed}\n")
    try:
        with asking() as asked:
            pd.play("deploy_pd.yml", "-l", "h1,h3").good()
        after = pids()
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"h1/pd-prefill-0.service", "h1/pd-prefill-1.service"}
        print(f"-l h1,h3: {asked.good} requests answered meanwhile, {len(asked.lost)} lost")
        # the router lets go of workers that restart before they do
        assert asked.good > 10
        assert asked.lost == []
        assert counts() == {"prefill": 3, "decode": 1}
    finally:
        (own / "h1.yml").unlink()
        own.rmdir()
        pd.play("deploy_pd.yml", "-l", "h1,h3").good()
    assert set(pd.play("deploy_pd.yml").good().changed.values()) == {0}


def test_a_limit_needs_no_facts_of_the_other_hosts(serving: Controller) -> None:
    """Addresses that are found at deploy, no fact cache, and a limit: the others' are known from the deployed plan."""
    pd = serving
    inventory = pd.home / "tests/lab/inventory/hosts.yml"
    text = inventory.read_text()
    row = next(line for line in text.splitlines() if line.strip().startswith("address:"))
    before = pids()
    own = pd.home / "tests/lab/inventory/host_vars"
    own.mkdir()
    try:
        # Rendered for another host where a task is delegated: the lock would be taken on the wrong one.
        inventory.write_text(text.replace(row, f"    ansible_host: {row.split(':', 1)[1].strip()}"))
        refused = pd.play("deploy_pd.yml")
        assert refused.code != 0
        assert "ansible_host of h1 depends on inventory_hostname" in refused.words
        assert "ansible_host: 10.77.0.11" in refused.words
        inventory.write_text(text.replace(row, ""))
        for number in range(1, 5):
            (own / f"h{number}.yml").write_text(f"ansible_host: 10.77.0.{10 + number}\n")
        pd.play("deploy_pd.yml").good()
        assert pd.play("deploy_pd.yml", "-l", "h1,h3").good().changed == {"h1": 0, "h3": 0}
    finally:
        inventory.write_text(text)
        shutil.rmtree(own)
    assert pids() == before
