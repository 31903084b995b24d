"""Checks of what is deployed: units, router, workers, and requests over every prefill-decode pair."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple
from urllib.parse import urlsplit

from .doctor_facts import Found, Json, Seen, by_value, error, info, numbers, ok, warning

_DEPLOY = "ansible-playbook deploy_pd.yml puts it right"
#: A stream that comes in one piece at the end says nothing of the time to first token.
_HELD_BACK = 0.9


def unit(seen: Seen) -> List[Found]:
    """Every unit of the deployment runs."""
    found: List[Found] = []
    for host, facts in seen.hosts.items() if seen.deployed else ():
        units = {row["name"]: row for row in facts["units"]}
        wanted = [rank["unit"] for _, rank in seen.ranks(host)]
        wanted += [seen.plan["router"]["unit"]] if seen.plan["router"]["host"] == host else []
        bad = 0
        for name in (item[: -len(".service")] for item in wanted):
            row = units.get(name, {"state": "not there", "detail": "", "last": ""})
            if row["state"] == "running":
                continue
            bad += 1
            said = f"; its log ends: {row['last']}" if row["last"] else ""
            what = f"{name} is {row['state']}{' (' + row['detail'] + ')' if row['detail'] else ''}{said}"
            found.append(error(host, what, f"{seen.log(host, name)}; {_DEPLOY}"))
        if wanted and not bad:
            found.append(ok(host, f"{len(wanted)} run"))
    return found


def restarts(seen: Seen) -> List[Found]:
    """No unit was started anew by its service manager."""
    found = [
        warning(host, f"{row['name']} was started anew {row['restarts']} time(s) ({row['detail']})", seen.log(host, row["name"]))
        for host, row in seen.units()
        if row["restarts"]
    ]
    return found or ([ok("all units", "never")] if any(seen.units()) else [])


def oom(seen: Seen) -> List[Found]:
    """No unit was ended for want of memory."""
    fix = "mem_fraction for GPU memory (smaller), else fewer workers there or more memory"
    found = [
        (warning if row["state"] == "running" else error)(host, f"{row['name']}: {row['oom']}", fix)
        for host, row in seen.units()
        if row["oom"]
    ]
    return found or ([ok("all units", "none")] if any(seen.units()) else [])


def router(seen: Seen) -> List[Found]:
    """The router answers and says that it is ready."""
    said = seen.front.get("router")
    if not said:
        return []
    where = f"router on {seen.plan['router']['host']}"
    if said["ready"] == 200:
        return [ok(where, f"ready at {seen.plan['router']['url']}")]
    if not said["ready"]:
        what = f"{seen.plan['router']['url']} does not answer from {seen.front['from']} ({said['error']})"
        return [error(where, what, f"pd-router on {seen.plan['router']['host']}: {_DEPLOY}")]
    if said["ready"] in (401, 403):
        return [error(where, f"it refuses the key (HTTP {said['ready']})", "api_key: the one it was deployed with")]
    return [error(where, f"it is not ready (HTTP {said['ready']} {said['error']})", "the workers below that it does not count")]


def worker_health(seen: Seen) -> List[Found]:
    """Every worker answers, and the router counts it as healthy."""
    sick = {
        row["url"].rstrip("/") for row in (seen.front.get("router", {}).get("workers") or []) if row["is_healthy"] is not True
    }
    found = []
    for name, said in seen.front.get("workers", {}).items():
        worker = seen.workers[name]
        host = worker["ranks"][0]["host"]
        if said["health"] == 200 and worker["url"] not in sick:
            continue
        if said["health"] == 200:
            fix = f"wait {_settle(seen)}; else the router's log"
            found.append(warning(name, f"answers on {host}, and the router counts it as unhealthy", fix))
        else:
            why = said["error"] or f"HTTP {said['health']}"
            fix = f"{seen.log(host, worker['ranks'][0]['unit'][: -len('.service')])}; {_DEPLOY}"
            found.append(error(name, f"{worker['url']} on {host} is not healthy ({why})", fix))
    return found or ([ok("all workers", f"{len(seen.front['workers'])} healthy")] if seen.front.get("workers") else [])


def _settle(seen: Seen) -> str:
    argv = [str(item) for item in seen.plan["router"]["argv"]]
    flag = "--health-check-interval-secs"
    return f"{argv[argv.index(flag) + 1]} s" if flag in argv else "for its next check"


def _members(seen: Seen) -> Tuple[Dict[str, Json], Dict[str, Json]]:
    """Return (the plan's, the router's) members by role and URL; workers of /workers that have no URL are left out."""
    wanted = {f"{w['role'].replace('aggregated', 'regular')} {w['url']}": w for w in seen.plan["workers"]}
    rows = seen.front["router"]["workers"] or []
    return wanted, {f"{row['worker_type']} {row['url'].rstrip('/')}": row for row in rows}


def membership(seen: Seen) -> List[Found]:
    """The router's workers are the plan's."""
    if seen.front.get("router", {}).get("workers") is None:
        return []
    wanted, known = _members(seen)
    fix = f"{_DEPLOY} without a restart"
    found = [error("router", f"{name} of the plan is not among its workers", fix) for name in wanted if name not in known]
    found += [error("router", f"{name} is among its workers and not in the plan", fix) for name in known if name not in wanted]
    return found or [ok("router", f"{len(known)} workers, as planned")]


def bootstrap_port(seen: Seen) -> List[Found]:
    """The bootstrap port that the router sends to decode workers is the one at which the prefill worker listens."""
    found, good = [], []
    rows = seen.front.get("router", {}).get("workers") or []
    by_url = {row["url"].rstrip("/"): row for row in rows}
    for name, said in seen.front.get("workers", {}).items():
        planned = seen.workers[name]["ranks"][0].get("bootstrap_port")
        if seen.workers[name]["role"] != "prefill" or planned is None:
            continue
        row = by_url.get(seen.workers[name]["url"])
        own = said["info"].get("disaggregation_bootstrap_port", planned)
        fix = f"bootstrap_port_base; {_DEPLOY}"
        if own != planned:
            found.append(error(name, f"it has its bootstrap port at {own}, and the plan at {planned}", fix))
        elif row is not None and row.get("bootstrap_port", planned) != own:
            told = row["bootstrap_port"]
            what = f"the router names bootstrap port {told or 'none (decode then takes 8998)'}, and it listens at {own}"
            found.append(error(name, what, f"--prefill URL {own} on the router's command line; {_DEPLOY}"))
        elif said["health"] == 200 and said["bootstrap_error"]:
            found.append(error(name, f"nothing listens at its bootstrap port {own} ({said['bootstrap_error']})", fix))
        else:
            good.append(f"{name} {own}")
    return found or ([ok("prefill workers", ", ".join(good))] if good else [])


def pair(seen: Seen) -> List[Found]:
    """A request over every prefill-decode pair, sent to both ends directly, is answered with its tokens."""
    rows = seen.front.get("pairs") or []
    found = []
    for row in rows:
        where = f"{row['prefill']} -> {row['decode']}" if row["prefill"] else row["decode"]
        if row["error"]:
            fix = f"{'ports between their hosts, transfer_backend, ' if row['prefill'] else ''}their logs ({_logs(seen, row)})"
            found.append(error(where, row["error"], fix))
    slowest = max((row["seconds"] for row in rows), default=0.0)
    return found or ([ok("all pairs", f"{len(rows)} of {len(rows)} serve, the slowest in {slowest:.2f} s")] if rows else [])


def _logs(seen: Seen, row: Json) -> str:
    """Return where the logs of a pair's two ends are."""
    names = [name for name in (row["prefill"], row["decode"]) if name]
    ranks = [seen.workers[name]["ranks"][0] for name in names]
    return ", ".join(seen.log(rank["host"], rank["unit"][: -len(".service")]) for rank in ranks)


def stream(seen: Seen) -> List[Found]:
    """A stream through the router brings tokens one by one, none of its events empty: else clients measure a TTFT of 0."""
    said = seen.front.get("stream")
    if not said:
        return []
    if said["error"]:
        return [error("router", f"a streamed request failed: {said['error']}", "the pairs above; the router's log")]
    times, end = said["tokens_s"], said["end_s"]
    fix = "another router (router: smg), or engine_version; a client must count tokens, not events (docs/metrics.md)"
    if said["empty_first_s"] is not None:
        early = said["empty_first_s"] < 0.5 * times[0]
        what = f"its first event came after {said['empty_first_s']:.3f} s without a token, the first token after {times[0]:.3f} s"
        return [
            (warning if early else info)("router", f"{what}: clients that stamp the first event report a TTFT too short", fix)
        ]
    if len(times) > 1 and times[0] > _HELD_BACK * end:
        what = (
            f"all tokens came in the last {(end - times[0]) * 1e3:.0f} ms of {end:.2f} s: the answer is held back, not streamed"
        )
        return [warning("router", what, fix)]
    return [ok("router", f"first token after {times[0]:.2f} s, {len(times)} events in {end:.2f} s")]


def slow_down(seen: Seen) -> List[Found]:
    """No worker is left slowed down (/slow_down)."""
    found, silent = [], 0
    for name, said in seen.front.get("workers", {}).items():
        body = """-H 'Content-Type: application/json' -d '{"forward_sleep_time": null}'"""
        fix = f"curl -X POST {seen.workers[name]['url']}/slow_down {body}"
        if said["info"].get("slow_down_s"):
            found.append(error(name, f"it sleeps {said['info']['slow_down_s']:g} s before every step", fix))
        elif "slow_down_s" not in said["info"]:
            silent += 1
            if _logged(seen, name, "slow_down"):
                # bench.yml itself makes one before each load point, to release what somebody left: no reason for alarm.
                what = "its log has a call of /slow_down (bench.yml makes one that releases it); the engine does not say if it is off"
                found.append(info(name, what, fix))
    good = "off" if not silent else "the engine does not say; no call in the logs"
    return found or ([ok("all workers", good)] if seen.front.get("workers") else [])


def profiler(seen: Seen) -> List[Found]:
    """No profiler is left running."""
    found, silent = [], 0
    for name, said in seen.front.get("workers", {}).items():
        running = said["info"].get("profiling")
        silent += running is None
        if running or (running is None and _logged(seen, name, "profile")):
            what = "a profiler runs on it" if running else "its log has a profile that was started and not ended"
            found.append(error(name, what, f"curl -X POST {seen.workers[name]['url']}/stop_profile"))
    good = "none" if not silent else "the engine does not say; none in the logs"
    return found or ([ok("all workers", good)] if seen.front.get("workers") else [])


def _logged(seen: Seen, worker: str, kind: str) -> str:
    """Return the last line of a kind in the logs of a worker's units, "" where there is none."""
    names = {rank["unit"][: -len(".service")] for rank in seen.workers[worker]["ranks"]}
    return next((str(row["log"][kind]) for _, row in seen.units() if row["name"] in names and row["log"].get(kind)), "")


def kv_failures(seen: Seen) -> List[Found]:
    """No worker counted a KV transfer, or its bootstrap, that failed."""
    found = []
    for name, said in seen.front.get("workers", {}).items():
        counted = {counter: value for counter, value in said["failures"].items() if value}
        if counted:
            listed = ", ".join(f"{counter} {value:g}" for counter, value in counted.items())
            what = f"since its start: {listed}"
            fix = "the pairs, ports and RDMA findings here; transfer_backend: nixl where fabrics differ"
            found.append((error if _broken(seen, name) else warning)(name, what, fix))
    return found or ([ok("all workers", "no failure counted")] if seen.front.get("workers") else [])


def kv_log(seen: Seen) -> List[Found]:
    """No log says that a KV cache did not arrive ("Failed to get kvcache", KVTransferError)."""
    found = []
    for name in seen.workers if seen.deployed else ():
        line = _logged(seen, name, "kv")
        if line:
            fix = "peermem, hca and fabric above on one fabric; transfer_backend: nixl (or auto) where fabrics differ"
            found.append((error if _broken(seen, name) else warning)(name, f"its log: {line}", fix))
    return found or ([ok("all logs", "none")] if any(seen.units()) else [])


def _broken(seen: Seen, worker: str) -> bool:
    """Whether a pair of the worker fails now: what failed before is then no thing of the past."""
    return any(row["error"] and worker in (row["prefill"], row["decode"]) for row in seen.front.get("pairs") or [])


def transport(seen: Seen) -> List[Found]:
    """The KV cache travels as planned; an engine that fell back to TCP says so in its log only."""
    found, sights = [], 0
    workers = seen.workers
    for entry in seen.plan.get("pairs", []) if seen.deployed else []:
        ways = dict(_ways(seen, workers[entry["prefill"]], workers[entry["decode"]]))
        sights += len(ways)
        for source, way in ways.items():
            if way != entry["expected_transport"]:
                where = f"{entry['prefill']} -> {entry['decode']}"
                what = f"the KV cache goes over {way} ({source}), and {entry['expected_transport']} is planned"
                fix = "rdma_devices, rdma_fabric, tcp_device of both hosts; hca and peermem here; plan.yml shows what is planned"
                found.append(error(where, what, fix))
    return found or ([ok("all pairs", f"{sights} sights, as planned")] if sights else [])


def _ways(seen: Seen, prefill: Json, decode: Json) -> Iterator[Tuple[str, str]]:
    """Yield (source, transport) of a pair: what decode says of this prefill worker, and what their logs say of all."""
    peer = f"{urlsplit(prefill['url']).hostname}:{prefill['ranks'][0].get('bootstrap_port')}"
    told = seen.front.get("workers", {}).get(decode["name"], {}).get("info", {}).get("emulated_transport") or {}
    if peer in told:
        yield "as the decode worker says", str(told[peer])
    for worker in (prefill, decode):
        line = _logged(seen, worker["name"], "tcp")
        if line:
            yield f"log of {worker['name']}: {line}", "tcp"


def backend(seen: Seen) -> List[Found]:
    """Prefill and decode workers say that they use one transfer engine."""
    return _alike(seen, ("disaggregation_transfer_backend",), "transfer_backend", error)


def kv_layout(seen: Seen) -> List[Found]:
    """Prefill and decode workers have one page size and one KV data type, without which decode cannot read the KV cache."""
    fix = "engine_args: {page-size: N, kv-cache-dtype: T} for both roles"
    return _alike(seen, ("page_size", "kv_cache_dtype"), fix, error)


def running_version(seen: Seen) -> List[Found]:
    """All workers run one version of the engine, the plan's."""
    found = _alike(seen, ("version",), "ansible-playbook deploy_pd.yml; with runtime: existing, one version everywhere", error)
    planned = str(seen.plan.get("engine_version", ""))
    for name, said in seen.front.get("workers", {}).items():
        version = str(said["info"].get("version") or "")
        if version and numbers(version) != numbers(planned):
            fix = f"engine_version={version.split('+')[0]}, or install {planned} there"
            found = [row for row in found if row.severity != "ok"]
            found.append(warning(name, f"it runs {version}, and the plan was made for {planned}", fix))
    return found


def _alike(seen: Seen, keys: Tuple[str, ...], fix: str, severe: Callable[[str, str, str], Found]) -> List[Found]:
    """Return a finding for each of ``keys`` of /server_info of which workers say different things."""
    found, said = [], []
    for key in keys:
        values: Mapping[str, Any] = {
            name: row["info"][key] for name, row in seen.front.get("workers", {}).items() if row["info"].get(key) is not None
        }
        if len(set(map(str, values.values()))) > 1:
            found.append(severe(" and ".join(values), f"{key} is {by_value(values)}", fix))
        elif values:
            said.append(f"{key} {next(iter(values.values()))}")
    return found or ([ok("all workers", ", ".join(said))] if said else [])


def busy(seen: Seen) -> List[Found]:
    """Nobody changes or measures the deployment at this moment; a request of ours would disturb it."""
    holder = seen.front.get("busy") or {}
    if not holder:
        return []
    what = f"{holder['verb']} of {holder['user']} on {holder['controller']} (pid {holder['pid']}) holds the lock"
    sent = "requests were sent all the same" if seen.front.get("pairs") else "no request was sent over the pairs"
    return [info("deployment", f"{what}: {sent}", "wait for it; once it is known to be dead, -e steal_lock=true")]


def kv_probe(seen: Seen) -> List[Found]:
    """Bytes moved as planned when the last deploy tried the transfer engine between the hosts (results/kv_probe.json)."""
    found, speeds = [], []
    for row in [*seen.probe.get("paths", []), *seen.probe.get("known", [])]:
        where = f"{row['prefill']} -> {row['decode']}"
        if row["ok"]:
            speeds.append(float(row["gb_s"] or 0.0))
        else:
            what = f"{row.get('finding') or row['seen']} ({row['when']})"
            found.append(error(where, what, f"{row.get('fix') or 'the ports and RDMA findings here'}; then {_DEPLOY}"))
    said = f"{len(speeds)} paths, {min(speeds):.3g} to {max(speeds):.3g} GB/s" if speeds else ""
    return found or ([ok("all paths", said)] if said else [])
