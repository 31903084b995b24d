"""The cluster as a picture: hosts with their GPUs, workers by role, router, client and the ways of the KV cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

Json = dict[str, Any]

_LEFT, _HOST_X, _HOST_W, _GAP = 20, 260, 420, 24
_CHIP, _CHIP_GAP, _WORKER_H, _HEAD = 34, 6, 58, 34
_PAD = 12
#: more links between hosts than this cannot be told apart: only their legend stays
_MOST_LINKS = 12
_LANE, _LINK_STEP = 16, 12


@dataclass
class _Worker:
    """The part of a worker that is on one host."""

    name: str
    role: str
    gpus: list[int]


@dataclass
class _Host:
    """A box: what is on the host and where the box stands."""

    name: str
    entry: Json
    workers: list[_Worker] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)
    serves: bool = False
    y: int = 0
    height: int = 0

    @property
    def middle(self) -> int:
        """Return the height at which links meet the box."""
        return self.y + self.height // 2


def cluster(plan: Json) -> Markup:
    """Return the cluster of a plan as an SVG element whose colours are classes of the page (``role-prefill``, ...)."""
    hosts = _hosts(plan)
    parts: list[str] = []
    y = 20
    for host in hosts:
        host.y = y
        parts += _draw_host(host)
        y += host.height + _GAP
    transports = Counter(str(pair.get("expected_transport") or "unknown") for pair in plan.get("pairs") or [])
    links = _links(plan, {host.name: host for host in hosts}, list(transports))
    bottom = max(y, 220)
    legend_y = bottom + 4
    parts += [*links, *_draw_router(plan, hosts, bottom), *_legend(plan, legend_y, transports)]
    width = _HOST_X + _HOST_W + 50 + _LANE * len(links)
    title = escape(f"Cluster of {plan.get('ratio')}: {len(hosts)} hosts")
    return Markup(
        f'<svg class="cluster" role="img" aria-label="{title}" viewBox="0 0 {width} {legend_y + 26 + 22 * len(transports)}" '
        f'width="{width}" xmlns="http://www.w3.org/2000/svg">{_MARKERS}{"".join(parts)}</svg>'
    )


_MARKERS = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerUnits="userSpaceOnUse" markerWidth="10" '
    'markerHeight="10" orient="auto">'
    '<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
)


def _hosts(plan: Json) -> list[_Host]:
    known: Json = plan.get("hosts") or {}
    hosts = {name: _Host(name, entry) for name, entry in known.items()}
    for worker in plan["workers"]:
        for rank in worker["ranks"]:
            host = hosts.setdefault(str(rank["host"]), _Host(str(rank["host"]), {}))
            many = len(worker["ranks"])
            name = worker["name"] + (f", rank {rank.get('node_rank', 0)} of {many}" if many > 1 else "")
            host.serves = host.serves or rank is worker["ranks"][0]
            host.workers.append(_Worker(name, worker["role"], list(rank["gpus"])))
    for host in hosts.values():
        used = {gpu for worker in host.workers for gpu in worker.gpus}
        host.idle = [gpu for gpu in host.entry.get("gpus") or [] if gpu not in used]
    router = (plan.get("router") or {}).get("host")
    return [host for host in hosts.values() if host.workers or host.idle or host.name != router]


def _step(count: int) -> int:
    """Return how far apart the squares of so many GPUs stand: closer where a row would not fit the box."""
    return min(_CHIP + _CHIP_GAP, (_HOST_W - 4 * _PAD) // max(count, 1))


def _chips(count: int) -> int:
    return count * _step(count) - _CHIP_GAP if count else 0


def _draw_host(host: _Host) -> list[str]:
    boxes: list[tuple[str, str, list[int], int]] = []
    for worker in host.workers:
        boxes.append((worker.name, worker.role, worker.gpus, max(_chips(len(worker.gpus)), 7 * len(worker.name)) + 2 * _PAD))
    if host.idle:
        boxes.append(("not used", "idle", host.idle, max(_chips(len(host.idle)), 60) + 2 * _PAD))
    x, y, parts = _HOST_X + _PAD, host.y + _HEAD, []
    for name, role, gpus, width in boxes:
        if x > _HOST_X + _PAD and x + width > _HOST_X + _HOST_W - _PAD:
            x, y = _HOST_X + _PAD, y + _WORKER_H + 8
        parts.append(f'<rect class="worker role-{role}" x="{x}" y="{y}" width="{width}" height="{_WORKER_H}" rx="6"/>')
        parts.append(_text(x + _PAD, y + 18, name, "small"))
        for place, gpu in enumerate(gpus):
            left, wide = x + _PAD + place * _step(len(gpus)), _step(len(gpus)) - _CHIP_GAP
            parts.append(f'<rect class="chip role-{role}" x="{left}" y="{y + 26}" width="{wide}" height="22" rx="3"/>')
            parts.append(_text(left + wide // 2, y + 41, str(gpu), "chiptext", "middle"))
        x += width + 8
    host.height = y + _WORKER_H + _PAD - host.y if boxes else _HEAD + 6
    facts = [str(host.entry[key]) for key in ("rdma_fabric",) if host.entry.get(key) not in (None, "none", "auto")]
    count = len(host.entry.get("gpus") or []) or len({gpu for worker in host.workers for gpu in worker.gpus})
    about = ", ".join([f"{count} GPU{'s' if count != 1 else ''}", *facts])
    frame = f'<rect class="host" x="{_HOST_X}" y="{host.y}" width="{_HOST_W}" height="{host.height}" rx="8"/>'
    heading = f'<text class="name" x="{_HOST_X + _PAD}" y="{host.y + 22}">{escape(_cut(host.name, 30))}'
    return [frame, f'{heading}<tspan class="small" dx="8">{escape(about)}</tspan></text>', *parts]


def _links(plan: Json, hosts: dict[str, _Host], transports: list[str]) -> list[str]:
    """Return the ways of the KV cache between hosts, each in a lane of its own; none where there are too many."""
    home = {worker["name"]: str(worker["ranks"][0]["host"]) for worker in plan["workers"]}
    ways = list(
        dict.fromkeys(
            (home[pair["prefill"]], home[pair["decode"]], str(pair.get("expected_transport") or "unknown"))
            for pair in plan.get("pairs") or []
            if pair["prefill"] in home and pair["decode"] in home
        )
    )
    if len(ways) > _MOST_LINKS:
        return []
    ends = Counter(host for way in ways for host in way[:2])
    met: Counter[str] = Counter()

    def meet(name: str) -> int:
        """Return the height of the next free place at the edge of a host's box."""
        place = met[name] - (ends[name] - 1) / 2
        met[name] += 1
        return round(hosts[name].middle + place * min(_LINK_STEP, (hosts[name].height - 16) / ends[name]))

    parts, right = [], _HOST_X + _HOST_W
    for number, (source, target, transport) in enumerate(ways):
        start, end, lane = meet(source), meet(target), right + 34 + _LANE * number
        kind = _kind(transports.index(transport))
        parts.append(f'<path class="{kind}" d="M{right} {start}H{lane}V{end}H{right + 3}" marker-end="url(#tip)"/>')
    return parts


def _kind(number: int) -> str:
    return f"kv kv-{min(number, 2)}"


def _draw_router(plan: Json, hosts: list[_Host], bottom: int) -> list[str]:
    router: Json = plan.get("router") or {}
    y = max(40, min(bottom // 2 - 70, 400))
    about = " ".join(str(router[key]) for key in ("name", "version") if router.get(key))
    boxes = [("client", "pdbench", y), ("router", about, y + 92)]
    parts = []
    for name, what, top in boxes:
        parts.append(f'<rect class="host" x="{_LEFT}" y="{top}" width="160" height="60" rx="8"/>')
        parts.append(_text(_LEFT + 80, top + 24, name, "name", "middle"))
        parts.append(_text(_LEFT + 80, top + 44, _cut(what, 24), "small", "middle"))
    if router.get("host"):
        parts.append(_text(_LEFT + 80, y + 92 + 78, _cut(f"on {router['host']}", 26), "small", "middle"))
    parts.append(f'<path class="way" d="M{_LEFT + 80} {y + 60}V{y + 90}" marker-end="url(#tip)"/>')
    for host in hosts:
        # Requests go to the first rank of a worker; it brings in the others.
        if host.serves:
            parts.append(
                f'<path class="way" d="M{_LEFT + 160} {y + 122}C{_HOST_X - 40} {y + 122} {_LEFT + 190} {host.middle} '
                f'{_HOST_X - 3} {host.middle}" marker-end="url(#tip)"/>'
            )
    return parts


def _legend(plan: Json, y: int, transports: Counter[str]) -> list[str]:
    roles = list(dict.fromkeys(worker["role"] for worker in plan["workers"]))
    parts, x = [], _HOST_X
    for role in roles:
        parts.append(f'<rect class="chip role-{role}" x="{x}" y="{y}" width="18" height="14" rx="3"/>')
        parts.append(_text(x + 24, y + 12, role, "small"))
        x += 44 + 8 * len(role)
    parts.append(_text(x, y + 12, "a numbered square is a GPU" + (", emulated" if plan.get("emulated") else ""), "small"))
    for number, (transport, count) in enumerate(transports.items()):
        y += 22
        parts.append(f'<path class="{_kind(number)}" d="M{_HOST_X} {y + 8}h34" marker-end="url(#tip)"/>')
        pairs = f"{count} prefill-decode pair" + ("" if count == 1 else "s")
        parts.append(_text(_HOST_X + 46, y + 12, f"KV cache, expected over {transport}: {pairs}", "small"))
    return parts


def _text(x: int, y: int, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
