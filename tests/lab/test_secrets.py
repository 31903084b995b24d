"""Keys and the router's certificate on hosts with systemd: whose files they are, who can read them, that all of it serves."""

from __future__ import annotations

from pathlib import Path

from certificates import certificate
from lab.common import address
from lab.controller import LOAD, Controller, forget, pids, sh

HOSTS = ("h1", "h2", "h3", "h4")


def secrets_of(host: str) -> dict[str, str]:
    """Every file of a host's folder of secrets, with mode and owner."""
    rows = sh(host, "find /var/lib/pd/secrets -type f -printf '%f %m %u\\n' 2>/dev/null; true").splitlines()
    return {name: f"{mode} {owner}" for name, mode, owner in map(str.split, rows)}


def test_keys_and_certificate_lie_where_they_are_read(pd: Controller, tmp_path: Path) -> None:
    forget(pd)
    ca = certificate(tmp_path, "ca", ())
    own = certificate(tmp_path, "router", (address("h3"),), signer=ca)
    words = ["-e", "api_key=generate", "-e", "admin_api_key=generate"]
    for name, file in (("cert", own.cert), ("key", own.key), ("ca", ca.cert)):
        words += ["-e", f"router_tls_{name}={file}"]
    bench = pd.play("bench.yml", "-vvv", *words, *LOAD, timeout_s=600).good()
    assert pd.result("latest", "validity.json")["valid"] is True
    assert pd.result("latest", "plan.json")["router"]["url"] == f"https://{address('h3')}:8000"
    mine = {"api_key": "600 pd", "admin_api_key": "600 pd"}
    assert {host: secrets_of(host) for host in HOSTS} == {
        "h1": mine, "h2": mine, "h3": {**mine, "router_tls_cert": "600 pd", "router_tls_key": "600 pd"}, "h4": mine,
    }  # fmt: skip
    kept = [path for path in (pd.home / ".pd" / "keys").rglob("*") if path.is_file()]
    assert sorted(path.name for path in kept) == ["admin_api_key", "api_key"]
    for path in kept:
        assert path.stat().st_mode & 0o777 == 0o600
        key = path.read_text().strip()
        assert key not in bench.text
        for host in HOSTS:
            # /proc is searched by a pattern that does not find its own command line
            hidden = f"[{key[0]}]{key[1:]}"
            assert sh(host, f"grep -laE -e '{hidden}' /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null; true") == ""
            held = sh(host, f"grep -rlE -e '{hidden}' /var/lib/pd /etc/systemd /opt/pd/run 2>/dev/null; true").splitlines()
            assert set(held) <= {f"/var/lib/pd/secrets/{path.name}"}, host
            assert sh(host, f"journalctl --no-pager | grep -cE -e '{hidden}'; true") == "0"
    before = pids()
    assert set(pd.play("deploy_pd.yml", *words).good().changed.values()) == {0}
    assert pids() == before
    pd.play("doctor.yml", *words).good()
    pd.play("teardown.yml").good()
    assert {host: secrets_of(host) for host in HOSTS} == {host: {} for host in HOSTS}
