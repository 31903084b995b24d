"""Who has business at which TCP port of a deployment, and the nftables ruleset of a host that lets in nobody else. Pure.

The ruleset is a table of our own, which polices ports of ours alone, and of those only packets that open a connection: nothing
that is open is ever cut, and no connection is tracked (KV transfers are wide). It never opens what another table closes.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Dict, FrozenSet, Iterable, List, Mapping, Optional, Sequence, Set, Tuple, Union

from .errors import UserError, listing

Json = Dict[str, Any]
Network = Union[IPv4Network, IPv6Network]
Span = Tuple[int, int]
TABLE, FILE, UNIT = "pd", "firewall.nft", "pd-firewall.service"
#: Mooncake takes its control and data ports from here (its config.h; MC_MIN_RPC_PORT, MC_MAX_RPC_PORT).
MOONCAKE_PORTS = (15000, 17000)
#: What Linux gives to those who ask for any port, where the host did not say: ZMQ, UCX, torch's rendezvous.
RANDOM_PORTS = (32768, 60999)
#: Where SGLang's torch rendezvous takes one from, on all addresses (0.5.23: get_free_port_below_ephemeral).
SGLANG_PORTS = (22000, 29999)
#: Ports that a rendezvous takes from its first on (SGLang's data-parallel attention).
_RENDEZVOUS = 16
_HEADER = "# Made from the plan by deploy_pd.yml; a change here is undone by the next deploy."


@dataclass(frozen=True)
class Port:
    """Ports ``first`` to ``last`` of ``host``, and who has business there: hosts, and the networks of a variable (``open_to``)."""

    host: str
    address: str
    first: int
    last: int
    what: str
    sources: FrozenSet[str]
    open_to: str = ""


def ports(plan: Mapping[str, Any], clients: Sequence[str] = ()) -> List[Port]:
    """Return every port that a deployment listens on; ``clients``: the bench clients' hosts."""
    workers = {rank["host"] for worker in plan.get("workers", []) for rank in worker["ranks"]}
    router, section = plan.get("router") or {}, plan.get("firewall") or {}
    found: List[Port] = []

    def add(at: Mapping[str, Any], span: Span, what: str, sources: Iterable[str], open_to: str = "") -> None:
        others = frozenset(sources) - {at["host"]}
        found.append(Port(at["host"], at.get("address") or "", span[0], min(span[1], 65535), what, others, open_to))

    for worker in plan.get("workers", []):
        for rank in worker["ranks"]:
            kinds = {
                "port": (1, f"HTTP of {worker['name']}"),
                "bootstrap_port": (1, f"bootstrap of {worker['name']}"),
                "side_channel_port": (rank.get("side_channels") or 1, f"KV side channel of {worker['name']}"),
                "dist_init_port": (_RENDEZVOUS, f"rendezvous of {worker['name']}"),
            }
            for kind, (count, what) in kinds.items():
                http = kind == "port"
                if rank.get(kind):
                    span = (rank[kind], rank[kind] + count - 1)
                    # Workers ask each other by HTTP, too: for a role that changes, for a KV cache that was given up.
                    add(rank, span, what, {*workers, *((router["host"], *clients) if http else ())}, "monitors" if http else "")
    if router.get("port"):
        add(router, (router["port"], router["port"]), "the router", clients, "clients")
    if router.get("prometheus_port"):
        add(router, (router["prometheus_port"], router["prometheus_port"]), "the router's metrics", clients, "monitors")
    if section.get("meet_port") and len(clients) > 1:
        first = {"host": clients[0], "address": section["bench"].get(clients[0])}
        add(first, (section["meet_port"], section["meet_port"]), "where bench clients meet", clients)
    for host in sorted(workers) if not plan.get("emulated", True) else ():
        for span in _random(plan, host):
            at = {"host": host, "address": _entry(plan, host).get("address")}
            add(at, span, "ports that its engine takes at random", workers)
    return found


def _entry(plan: Mapping[str, Any], host: str) -> Json:
    return dict(plan.get("hosts", {}).get(host) or {})


def _random(plan: Mapping[str, Any], host: str) -> List[Span]:
    """The ranges that an engine on a host takes ports from: which, it says to nobody before it has them."""
    said = (_entry(plan, host).get("firewall") or {}).get("range") or RANDOM_PORTS
    # A deployed plan is a file, which somebody may have edited.
    said = said if len(said) == 2 and 0 < said[0] <= said[1] < 65536 else RANDOM_PORTS
    moving = str(plan.get("transfer_backend", "")).startswith("mooncake")
    below = plan.get("engine") == "sglang"
    return [(said[0], said[1]), *([SGLANG_PORTS] if below else []), *([MOONCAKE_PORTS] if moving else [])]


# -- the ruleset


def network(text: Any) -> Optional[Network]:
    """Return an address or network, None for what is none (a host's name, say)."""
    try:
        return ip_network(str(text))
    except ValueError:
        return None


def routed(address: str) -> bool:
    """Whether an address means one host alone, whatever the link."""
    try:
        return not ip_address(address).is_link_local
    except ValueError:
        return False


def inside(address: str, networks: Iterable[Network]) -> bool:
    """Whether an address lies in one of the networks."""
    try:
        own = ip_address(address)
    except ValueError:
        return False
    return any(own in item for item in networks)


def merged(spans: Iterable[Span]) -> List[Span]:
    """Return spans of ports in order, those that overlap or touch as one: nft takes no others."""
    found: List[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def span_of(text: str) -> Span:
    """Return the ports of ``50051`` or ``32803-32810``; raise ValueError for anything else."""
    first, _, last = str(text).partition("-")
    span = (int(first), int(last or first))
    if not 1 <= span[0] <= span[1] <= 65535:
        raise ValueError(text)
    return span


def wanted(plan: Optional[Mapping[str, Any]], host: str) -> bool:
    """Whether a plan has the firewall on a host."""
    return bool(_entry(plan or {}, host).get("firewall"))


def polices(plan: Mapping[str, Any], host: str, port: int) -> bool:
    """Whether our firewall on a host keeps strangers out of a port."""
    return wanted(plan, host) and any(row.host == host and row.first <= port <= row.last for row in ports(plan))


def comes_in(plan: Mapping[str, Any], source: str, host: str, port: int) -> bool:
    """Whether connections of one host of a plan reach a port of another, as far as our firewall goes."""
    if source == host or not wanted(plan, host):
        return True
    return any(row.host == host and row.first <= port <= row.last and source in row.sources for row in ports(plan))


def admitted(plan: Mapping[str, Any], port: Port) -> Set[Network]:
    """Return the networks that a plan lets in at a port; names are nobody's address and are left out."""
    section = plan.get("firewall") or {}
    bench = section.get("bench") or {}
    known = [_entry(plan, source).get("address") or bench.get(source) for source in port.sources]
    known += [own for source in port.sources for own in _entry(plan, source).get("tcp_addresses") or []]
    found = [network(text) for text in [*known, *(section.get(port.open_to) or [])]]
    return {item for item in found if item is not None}


def ruleset(plans: Sequence[Mapping[str, Any]], host: str) -> str:
    """Return what ``nft -f`` loads on a host, at once and whatever was there: all that any of the plans admits.

    Two plans: while a deployment changes from one to the other.
    """
    policed: Set[Span] = set()
    by_source: Dict[Network, Set[Span]] = {}
    spared: Set[Span] = set()
    for plan in plans:
        for text in (_entry(plan, host).get("firewall") or {}).get("spared") or []:
            with contextlib.suppress(ValueError):
                spared.add(span_of(text))
        for port in ports(plan, list((plan.get("firewall") or {}).get("bench") or {})):
            if port.host == host and 0 < port.first <= port.last:
                policed.add((port.first, port.last))
                for source in admitted(plan, port):
                    by_source.setdefault(source, set()).add((port.first, port.last))
    rules = ['iif "lo" accept', "tcp flags & (fin | syn | rst | ack) != syn accept"]
    if spared:
        rules.append(f"tcp dport {_ports(spared)} accept")
    alike: Dict[str, List[Network]] = {}
    for source, spans in by_source.items():
        alike.setdefault(_ports(spans), []).append(source)
    for where, sources in sorted(alike.items()):
        for word, kind in (("ip", IPv4Network), ("ip6", IPv6Network)):
            listed = _apart([item for item in sources if isinstance(item, kind)])
            if listed:
                rules.append(f"{word} saddr {{ {', '.join(map(_plain, listed))} }} tcp dport {where} accept")
    rules += [f"tcp dport {_ports(policed)} counter drop"] if policed else []
    lines = "\n".join(f"\t\t{rule}" for rule in rules)
    # To delete a table that is not there is an error, and to declare one that is there is none.
    return f"""{_HEADER}
table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
\tchain input {{
\t\ttype filter hook input priority 0; policy accept;
{lines}
\t}}
}}
"""


def _ports(spans: Iterable[Span]) -> str:
    return f"{{ {', '.join(str(first) if first == last else f'{first}-{last}' for first, last in merged(spans))} }}"


def _apart(items: Sequence[Any]) -> List[Any]:
    """Return networks of one family without those that lie in another: nft takes none twice."""
    return sorted(item for item in items if not any(item != other and item.subnet_of(other) for other in items))


def _plain(item: Network) -> str:
    return str(item.network_address) if item.prefixlen == item.max_prefixlen else str(item)


def texts(current: Optional[Mapping[str, Any]], target: Mapping[str, Any], host: str) -> Tuple[str, str]:
    """Return a host's ruleset while the deployment changes from one plan to another, and after it; "": there is none.

    While it changes, all that either plan needs is let in: workers that come are asked before others leave.
    """
    after = ruleset([target], host) if wanted(target, host) else ""
    if current is None or (not after and host in target.get("hosts", {})):
        return after, after
    if not after:
        return (ruleset([current], host) if wanted(current, host) else ""), ""
    return ruleset([target, current], host), after


def changes(
    current: Optional[Mapping[str, Any]], target: Mapping[str, Any], has: Mapping[str, bool]
) -> Dict[str, Dict[str, str]]:
    """Return host -> its :func:`texts` (``during``, ``after``), of hosts that have a ruleset or get one.

    ``has``: host -> whether one of ours was found there.
    """
    found = {}
    for host in dict.fromkeys([*target.get("hosts", {}), *has]):
        during, after = texts(current, target, host)
        if during or after or has.get(host):
            found[host] = {"during": during, "after": after}
    return found


def check(plan: Mapping[str, Any], current: Optional[Mapping[str, Any]], limit: Optional[FrozenSet[str]]) -> None:
    """Refuse what no ruleset can be made of, and a ``--limit`` that leaves out hosts whose ruleset would have to change."""
    section = plan.get("firewall")
    if section:
        named = {name: entry["address"] for name, entry in plan["hosts"].items()}
        named.update(section["bench"])
        for name, address in named.items():
            if network(address) is None:
                raise UserError(
                    f"firewall: true knows hosts by their IP address, and address of {name} is {address}: set it in its host_vars"
                )
    if limit is None or current is None:
        return
    everyone = dict.fromkeys([*plan["hosts"], *current.get("hosts", {})])
    outside = [host for host in everyone if host not in limit]
    stale = [host for host in outside if texts(None, current, host)[1] != texts(None, plan, host)[1]]
    if stale:
        raise UserError(
            f"--limit leaves out {listing(stale)}, whose firewall would have to admit other hosts: "
            f"type -l {','.join([*sorted(limit), *stale])}"
        )


def closed(text: str) -> List[Span]:
    """Return the ports that a ruleset of :func:`ruleset` closes to others."""
    found: Dict[str, List[Span]] = {"accept": [], "counter drop": []}
    for listed, verdict in re.findall(r"^\t\ttcp dport \{ (.*) \} (accept|counter drop)$", text, re.M):
        found[verdict] = [span_of(item) for item in listed.split(", ")]
    for first, last in found["accept"]:
        kept = [((one, min(two, first - 1)), (max(one, last + 1), two)) for one, two in found["counter drop"]]
        found["counter drop"] = [span for pair in kept for span in pair if span[0] <= span[1]]
    return found["counter drop"]


# -- its unit

#: nft reads its rules, wherever they lie, and speaks netlink to the kernel.
_HARDENING = """\
CapabilityBoundingSet=CAP_NET_ADMIN CAP_DAC_READ_SEARCH
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
UMask=0077
"""


def unit(state_dir: str) -> str:
    """Return the systemd service that loads the ruleset when the host starts, before it has a network.

    nftables.service flushes every table: when it is restarted or reloaded, ours is loaded after it. One that was not running
    and is started by itself takes ours along until the next deploy (doctor.yml says so).
    """
    path = f"{state_dir}/{FILE}".replace("%", "%%")
    return f"""{_HEADER}
[Unit]
Description=PD firewall: who may open connections to workers and router
DefaultDependencies=no
RequiresMountsFor={state_dir.replace("%", "%%")}
After=nftables.service
PartOf=nftables.service
ReloadPropagatedFrom=nftables.service
Before=network-pre.target shutdown.target
Wants=network-pre.target
Conflicts=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=nft -f "{path}"
ExecReload=nft -f "{path}"
ExecStop=-nft delete table inet {TABLE}
{_HARDENING}
[Install]
WantedBy=sysinit.target
"""


def rendered(plan: Mapping[str, Any], host: str) -> Dict[str, str]:
    """Return the files of a host's firewall by name; none where it has none."""
    if not wanted(plan, host):
        return {}
    return {FILE: ruleset([plan], host), UNIT: unit(plan["hosts"][host]["state_dir"])}
