"""The lab itself: its hosts are hosts, and its faults are the faults that they claim to be."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from lab import base, cgroups, hosts, network
from lab.common import STATE, LabError, address, itself, leader, run
from lab.controller import reaches, sh, ssh, until

NAMES = ["h1", "h2", "h3", "h4"]


def test_every_host_is_a_host_of_its_own() -> None:
    seen = set()
    for host in NAMES:
        said = ssh(
            host,
            "hostname; id -un; sudo -n /bin/sh -c 'id -un'; cat /proc/1/comm; systemctl is-system-running; cat /etc/machine-id",
        )
        name, user, root, first, state, machine = said.stdout.split()
        assert (name, user, root, first, state) == (host, "ops", "root", "systemd", "running"), said
        seen.add(machine)
        assert f"{address(host)}/24" in sh(host, "ip -4 addr show eth0")
        assert sh(host, f"getent hosts {NAMES[0]}").split()[0] == address(NAMES[0])
    assert len(seen) == len(NAMES)


def test_host_keys_are_checked(tmp_path: Path) -> None:
    assert ssh("h1", "true").returncode == 0
    rows = [row.split(" ", 1) for row in (STATE / "known_hosts").read_text().splitlines()]
    swapped = "".join(f"{names} {rows[1 - index][1]}\n" for index, (names, _) in enumerate(rows[:2]))
    (tmp_path / "known_hosts").write_text(swapped)
    config = ("-F", STATE / "ssh_config.outside", "-o", f"UserKnownHostsFile={tmp_path}/known_hosts")
    refused = run("ssh", *config, "h1", "true", check=False)
    assert refused.returncode == 255
    assert "Host key verification failed" in refused.stderr


def test_nothing_in_the_lab_reaches_out_and_nothing_outside_reaches_in() -> None:
    assert sh("h1", "ip route show default") == f"default via {address('controller')} dev eth0"
    # an address of documentation (RFC 5737): the packet reaches the controller's end and goes no further
    assert sh("h1", "timeout 2 bash -c '</dev/tcp/192.0.2.1/80' 2>/dev/null && echo yes || echo no") == "no"
    assert address("h1") not in run("ip", "route", "show", "table", "all").stdout


def test_a_reboot_keeps_address_and_disk() -> None:
    boot = "cat /proc/sys/kernel/random/boot_id"
    before = sh("h1", f"{boot}; echo kept > /var/lib/kept")
    ssh("h1", "sudo /bin/sh -c 'systemctl reboot'")
    until("h1 has another boot id", lambda: leader("h1") and sh("h1", boot, check=False) not in ("", before))
    network.wait_ssh(["h1"])
    assert ssh("h1", "hostname; cat /var/lib/kept").stdout.split() == ["h1", "kept"]
    assert f"{address('h1')}/24" in sh("h1", "ip -4 addr show eth0")


def test_power_loss_and_return() -> None:
    sh("h2", "echo kept > /var/lib/kept; sync")
    started = time.monotonic()
    hosts.kill("h2")
    assert time.monotonic() - started < 10
    assert leader("h2") is None
    assert not reaches("h1", "h2")
    hosts.up(len(NAMES))
    assert ssh("h2", "cat /var/lib/kept").stdout == "kept\n"
    assert len(sh("h2", "journalctl --list-boots --no-pager").splitlines()) >= 2


def test_a_host_that_hangs_takes_connections_and_says_nothing() -> None:
    cgroups.freeze("h2", True)
    asked = "exec 3<>/dev/tcp/{}/22 && echo connected; timeout 2 head -c 4 <&3"
    assert sh("h1", asked.format(address("h2")), check=False) == "connected"
    cgroups.freeze("h2", False)
    assert sh("h1", asked.format(address("h2"))).split() == ["connected", "SSH-"]


def test_a_partition_cuts_two_hosts_and_no_others() -> None:
    network.partition("h1", "h2")
    assert not reaches("h1", "h2")
    assert not reaches("h2", "h1")
    assert all(reaches(*pair) for pair in (("h1", "h3"), ("h3", "h2"), ("h2", "h4")))
    assert ssh("h1", "hostname").stdout == "h1\n"
    network.heal()
    assert reaches("h1", "h2")
    network.partition("h4", "controller")
    assert ssh("h4", "true").returncode == 255
    assert reaches("h3", "h4")


def test_a_cable_that_is_out_stays_out_over_power_loss() -> None:
    network.unplug("h4")
    assert not reaches("h3", "h4")
    hosts.kill("h4")
    hosts.up(len(NAMES))
    assert not reaches("h3", "h4")
    network.heal()
    assert reaches("h3", "h4")


def _seconds(megabytes: int) -> float:
    """How long h1 takes to send so much to h2."""
    receiver = "python3 -c 'import socket; s=socket.create_server((\"\", 9000)); c=s.accept()[0]\nwhile c.recv(1<<16): pass'"
    process = subprocess.Popen(hosts.on_host("h2", ["bash", "-c", receiver]))
    try:
        until("h2 listens", lambda: "9000" in sh("h2", "ss -ltn"))
        started = time.monotonic()
        sh("h1", f"head -c {megabytes}M /dev/zero > /dev/tcp/{address('h2')}/9000")
        process.wait(60)
        return time.monotonic() - started
    finally:
        process.kill()
        process.wait()


def test_a_rate_holds() -> None:
    network.shape("h2", "160mbit", 0)
    fast = _seconds(8)
    network.shape("h2", "20mbit", 0)
    slow = _seconds(8)
    assert slow > 3.2  # 8 MiB at 20 Mbit/s: 3.4 s
    assert slow / fast > 2.5, (fast, slow)


def test_a_delay_is_paid_in_each_direction() -> None:
    def rtt() -> float:
        return float(sh("h1", f"ping -q -c 5 -i 0.2 {address('h2')} | tail -1").split("/")[4])

    assert rtt() < 20
    network.shape("h2", "", 25)
    assert 50 <= rtt() < 120
    network.shape("h2", "", 0)
    assert rtt() < 20


def test_the_commands_of_a_person() -> None:
    said = subprocess.run(itself("status"), capture_output=True, text=True, check=True).stdout
    assert [line.split()[:3] for line in said.splitlines()] == [[host, address(host), "on,"] for host in NAMES]
    inside = subprocess.run(itself("exec", "--", "getent", "hosts", "h3"), capture_output=True, text=True, check=True).stdout
    assert inside.split()[0] == address("h3")
    wrong = subprocess.run(itself("kill", "h9"), capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (1, "lab: there is no h9: see `lab status`\n")


def test_a_machine_that_cannot_have_a_lab_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert base.unfit() == ""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert base.unfit() == "the lab needs root"
    monkeypatch.undo()
    monkeypatch.setattr("shutil.which", lambda name: None if name == "mmdebstrap" else f"/bin/{name}")
    assert base.unfit() == "the lab needs Debian packages: mmdebstrap (make lab-deps)"
    with pytest.raises(LabError, match="not a host: web1"):
        address("web1")
