"""Checks of what the deployment shows to those who have no business with it: ports that answer, sockets on all addresses."""

from __future__ import annotations

from typing import Dict, List, Tuple

from . import firewall
from .doctor_facts import Found, Seen, error, info, ok
from .errors import listing

_CLOSE = "firewall: true (docs/security.md), or a firewall of yours"


def exposure(seen: Seen) -> List[Found]:
    """Ports of the deployment answer hosts that have business there, and no others."""
    found: List[Found] = []
    open_to: Dict[Tuple[str, int, str], List[str]] = {}
    tried = 0
    for host, rows in seen.reach.items():
        for row in (row for row in rows if row.get("stranger")):
            tried += 1
            if row["state"] == "open":
                open_to.setdefault((row["to"], row["port"], row["what"]), []).append(host)
    bare: Dict[str, List[str]] = {}
    for (host, port, what), others in open_to.items():
        said = f"{port} ({what}) answers {listing(others)}"
        if firewall.wanted(seen.plan, host):
            why = f"port {said}, which the plan does not let in: the table inet {firewall.TABLE} is not there, or was edited"
            found.append(error(host, why, f"ansible-playbook deploy_pd.yml; nft list table inet {firewall.TABLE} there"))
        else:
            bare.setdefault(host, []).append(said)
    for host, facts in seen.hosts.items():
        unsaid = not any(row.host == host for row in found)
        if seen.deployed and unsaid and firewall.wanted(seen.plan, host) and facts.get("walled") is False:
            why = f"the table inet {firewall.TABLE} is not there, or was edited since it was loaded"
            found.append(error(host, why, f"ansible-playbook deploy_pd.yml; nft list table inet {firewall.TABLE} there"))
    for host, listed in bare.items():
        found.append(info(host, f"ports that answer hosts which have no business there: {'; '.join(listed)}", _CLOSE))
    return found + ([ok("between hosts", f"{tried} ways that lead nowhere")] if tried and not found else [])


def wildcard(seen: Seen) -> List[Found]:
    """What the deployment runs listens at the address that it was given, not at all addresses of its host."""
    entries = [*(rank for worker in seen.workers.values() for rank in worker["ranks"]), seen.plan.get("router") or {}]
    listens = {(entry.get("host"), entry.get("unit", "")[: -len(".service")]): entry for entry in entries}
    found: List[Found] = []
    for host, facts in seen.hosts.items():
        for row in facts.get("wildcards", []):
            entry = listens.get((host, row["unit"]), {})
            planned = row["port"] in [
                entry.get(kind) for kind in ("port", "bootstrap_port", "side_channel_port", "prometheus_port")
            ]
            what = f"{row['unit']} listens at port {row['port']} of all addresses"
            if planned and entry["listen"] not in ("0.0.0.0", "::"):
                fix = "ansible-playbook deploy_pd.yml; engine_args and router_args that set a host of their own"
                found.append(error(host, f"{what}, and the plan has {entry['listen']}", fix))
            elif planned:
                found.append(info(host, f"{what}, as listen_address says", "leave listen_address out: it is address then"))
            elif not firewall.polices(seen.plan, host, row["port"]):
                found.append(info(host, f"{what}: its engine opens it so, and has no setting for it", _CLOSE))
    examined = [host for host, facts in seen.hosts.items() if seen.deployed and "wildcards" in facts]
    return found + [ok(host, "") for host in examined if not any(row.host == host for row in found)]
