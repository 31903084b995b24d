"""From a plan entry to what a service manager reads: systemd units, supervisord programs, and the script both can run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from . import firewall
from .processes import work_dir
from .runtimes import client_env

Json = Dict[str, Any]
HEADER = "# Made from the plan by deploy_pd.yml; a change here is undone by the next deploy."
#: The first line of every process in a log that goes on from one to the next.
STARTED = "== pd: started"


def host_units(plan: Mapping[str, Any], host: str) -> List[Json]:
    """Return the services that one host runs.

    Each: ``name`` (``pd-prefill-0``), ``argv``, ``env``, ``ports`` (what it binds), ``listen``, ``health_url`` (None for
    ranks that serve nothing), ``members``: the tail of argv that may change without a restart, ``user``: who it runs as
    under systemd, ``gpu``: whether it uses real GPUs, ``cache_dir``: where a worker keeps compiled kernels, if the host says,
    ``as_one``: a hash of all ranks of a worker that has several, and ``switch``: how a role that may change while the worker runs
    is changed (role_switch.py). A unit that runs a container has ``container``
    (runtimes.py), and ``argv`` is that of its client.
    """
    units: List[Json] = []
    entry = plan["hosts"].get(host, {})
    for worker in plan["workers"]:
        for rank in worker["ranks"]:
            if rank["host"] == host:
                ports = [rank[kind] for kind in ("port", "bootstrap_port", "side_channel_port") if kind in rank]
                gpu = bool(rank["gpus"]) and not plan["emulated"] and not plan["on_cpu"]
                unit = _unit(rank, worker["name"], ports, rank.get("health_url"), [], gpu)
                units.append({**unit, **_as_one(worker), **_switch(plan, worker, rank), "cache_dir": entry.get("cache_dir")})
    router = plan["router"]
    if router["host"] == host:
        ports = [router["port"], router["prometheus_port"]]
        units.append(_unit(router, "router", ports, f"{router['url']}/health", router["members"], False))
    user = entry["service_user"] if entry.get("service_manager") == "systemd" else ""
    # The client of a container needs root's rights, or a group that is worth as much; the container is what confines.
    return [{**unit, "user": "root" if user and unit.get("container") else user} for unit in units]


def _as_one(worker: Mapping[str, Any]) -> Json:
    """Ranks meet once, at their start: what changes one of them restarts all, on every host, as does another ``meeting``."""
    if len(worker["ranks"]) == 1:
        return {}
    rows = [[rank["host"], rank["argv"], sorted(rank["env"].items())] for rank in worker["ranks"]]
    text = json.dumps([rows, worker.get("meeting", 0)])
    return {"as_one": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _switch(plan: Mapping[str, Any], worker: Mapping[str, Any], rank: Mapping[str, Any]) -> Json:
    if "switch" not in rank:
        return {}
    peers = [other["url"] for other in plan["workers"] if other["role"] == "decode" and other["name"] != worker["name"]]
    return {"switch": {**rank["switch"], "url": worker["url"], "decode_peers": peers}}


def _unit(
    entry: Mapping[str, Any], name: str, ports: List[int], health_url: Optional[str], members: List[str], gpu: bool
) -> Json:
    container = entry.get("container")
    return {
        "name": entry["unit"][: -len(".service")],
        "title": name,
        "argv": list(container["argv"] if container else entry["argv"]),
        "env": client_env(entry["env"]) if container else dict(entry["env"]),
        "listen": entry["listen"],
        "ports": ports,
        "health_url": health_url,
        "members": list(members),
        "gpu": gpu,
        **({"container": {key: container[key] for key in ("runtime", "name", "folders", "record")}} if container else {}),
    }


def identity(unit: Mapping[str, Any], secret: str = "") -> str:
    """Return a hash of all that needs a restart when it changes; a router's members do not, nor does a role that can be switched.

    ``secret``: the key that the unit is started with, so that a new key restarts it.
    """
    argv = list(unit["argv"][: len(unit["argv"]) - len(unit["members"])])
    if unit.get("switch"):
        argv = any_role(argv, unit["switch"]["flag"])
    more = [unit[key] for key in ("user", "as_one") if unit.get(key)]
    text = json.dumps([argv, sorted(unit["env"].items()), secret, *more])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def any_role(argv: Sequence[str], flag: str) -> List[str]:
    """Return a worker's command line without what its role is."""
    place = list(argv).index(flag) + 1
    return [*argv[:place], "*", *argv[place + 1 :]]


def run_script(unit: Mapping[str, Any], state_dir: str) -> str:
    """Return a shell script that becomes the unit's process: supervisord runs it, and so can a person."""
    lines = ["#!/bin/sh", HEADER, f'echo "{STARTED} $(date -u +%Y-%m-%dT%H:%M:%SZ)" >&2']
    lines += [f"export {key}={shlex.quote(value)}" for key, value in sorted(unit["env"].items())]
    lines.append(f"cd {shlex.quote(work_dir(state_dir, unit['name']))} || exit 1")
    if unit.get("container"):
        # One that outlived its client, which was killed.
        lines.append(f"{_remove(unit, shlex.quote)} >/dev/null 2>&1")
    lines.append("exec " + _command_lines(unit["argv"], shlex.quote))
    return "\n".join(lines) + "\n"


def _remove(unit: Mapping[str, Any], quote: Callable[[str], str]) -> str:
    """Return the command that ends a unit's container: it is no child of its client, and does not end with it."""
    return f"{unit['container']['runtime']} rm --force {quote(unit['container']['name'])}"


def supervisor_program(unit: Mapping[str, Any], state_dir: str) -> str:
    """Return a supervisord program that runs the unit's script; it does not change when the command line does."""
    name = unit["name"]
    return f"""{HEADER.replace("#", ";", 1)}
[program:{name}]
command=/bin/sh {shlex.quote(f"{state_dir}/units/{name}.sh")}
directory={work_dir(state_dir, name)}
autostart=false
autorestart=true
; As systemd does it: what ends within six minutes of its start is given up after five times.
startsecs=360
startretries=4
stopasgroup=true
killasgroup=true
stopwaitsecs=90
redirect_stderr=true
stdout_logfile={state_dir}/log/{name}.log
stdout_logfile_maxbytes=64MB
stdout_logfile_backups=2
"""


def supervisor_conf(state_dir: str, socket: str) -> str:
    """Return supervisord's own configuration: one socket in our folder, no network port."""
    return f"""{HEADER.replace("#", ";", 1)}
[unix_http_server]
file={socket}
chmod=0700

[supervisord]
logfile={state_dir}/log/supervisord.log
logfile_maxbytes=16MB
pidfile={state_dir}/supervisord.pid
childlogdir={state_dir}/log
directory={work_dir(state_dir, "supervisord")}

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[include]
files = conf.d/*.conf
"""


def socket_path(state_dir: str) -> str:
    """Return where supervisord's socket lies: in the state directory, or under /tmp when that would be too long.

    A unix socket's path takes 107 bytes, and supervisord first makes it with its process id at the end.
    """
    inside = f"{state_dir}/supervisor.sock"
    if len(inside.encode()) <= 96:
        return inside
    return f"/tmp/pd-{hashlib.sha256(state_dir.encode()).hexdigest()[:16]}.sock"


def _command_lines(argv: Sequence[str], quote: Callable[[str], str]) -> str:
    """One line for the program and one for each flag with its values."""
    lines = [quote(argv[0])]
    for item in argv[1:]:
        if item.startswith("--"):
            lines.append(quote(item))
        else:
            lines[-1] += " " + quote(item)
    return " \\\n  ".join(lines)


def _systemd_word(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    escaped = escaped.replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"' if any(c in text for c in " \t\n\r\"'\\;{}") or text == "" else escaped


#: Every line was tried against what RDMA and GPUs need (docs/hosts.md says what is left out, and why).
_HARDENING = """\
NoNewPrivileges=yes
ProtectSystem=full
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
UMask=0027
"""
#: With the rights of root, because a service that gains none cannot run the setuid program that makes the GPUs' device files.
#: 255 is /dev/nvidiactl, and loads the driver, which then says which minors its GPUs have; with -u it makes /dev/nvidia-uvm alone.
_GPU_FILES = """\
ExecStartPre=+-/bin/sh -c 'command -v nvidia-modprobe >/dev/null || exit 0; nvidia-modprobe -c 255; \\
  nvidia-modprobe $$(sed -n "s/^Device Minor:/-c/p" /proc/driver/nvidia/gpus/*/information); nvidia-modprobe -u -c 0'
"""


def _paths(unit: Mapping[str, Any]) -> List[str]:
    """Return the paths that a unit's command line and environment name: its Python, model, caches, files."""
    named = [*unit["argv"], *(part for value in unit["env"].values() for part in value.split(":")), unit.get("cache_dir") or ""]
    named += (unit.get("container") or {}).get("folders", [])
    found = {os.path.normpath(word) for word in named if re.fullmatch(r"/[^/\0-\x1f][^\0-\x1f]*", word)}
    # What lies in another is there with it.
    return sorted(path for path in found if not any(path.startswith(f"{other}/") for other in found))


def systemd_unit(unit: Mapping[str, Any], state_dir: str, ratio: str) -> str:
    """Return the systemd service; its environment lies in ``<state_dir>/units/<name>.env``."""
    user = unit.get("user") or "root"
    # Root without its capabilities is nobody's root; any other user has none to lose.
    account = f"User={user}\n" + ("" if user == "root" else "CapabilityBoundingSet=\n")
    container = unit.get("container")
    before = f"ExecStartPre=/bin/echo {_systemd_word(STARTED)}\n" + (_GPU_FILES if unit.get("gpu") else "")
    after, needs, hardening = "", "", _HARDENING
    if container:
        remove = _remove(unit, _systemd_word)
        before += f"ExecStartPre=-{remove}\n"
        # 143: ended by the SIGTERM that the client passed on.
        after = f"ExecStopPost=-{remove}\nSuccessExitStatus=143\n"
        needs = " docker.service" if container["runtime"] == "docker" else ""
        # podman sets containers up itself, with all that a confined service may not do.
        hardening = "" if container["runtime"] == "podman" else _HARDENING
    paths = " ".join(_systemd_path(_quoted(path)) for path in _paths(unit))
    return f"""{HEADER}
[Unit]
Description=PD {unit["title"]} ({ratio})
After=network-online.target remote-fs.target{needs}
# After a boot, what GPUs and RDMA cards need first; what is not installed is nothing to wait for.
After=nvidia-persistenced.service nvidia-fabricmanager.service openibd.service
Wants=network-online.target
RequiresMountsFor={paths}
PartOf=pd.target
# A model that takes minutes to load and dies is given up after five times.
StartLimitIntervalSec=1800
StartLimitBurst=5

[Service]
{account}EnvironmentFile={_systemd_path(state_dir)}/units/{unit["name"]}.env
WorkingDirectory={_systemd_path(work_dir(state_dir, unit["name"]))}
{before}ExecStart={_command_lines(unit["argv"], _systemd_word)}
{after}# vLLM ends with status 0 when its engine died.
Restart=always
RestartSec=5
# Only the engine's first process is asked to end: it drains, and ends the others itself.
KillMode=mixed
TimeoutStopSec=90
SyslogIdentifier={unit["name"]}
LimitCORE=0
LimitMEMLOCK=infinity
LimitNOFILE=1048576
TasksMax=infinity
{hardening}
[Install]
WantedBy=pd.target
"""


def _systemd_path(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def systemd_env(unit: Mapping[str, Any]) -> str:
    """Return the EnvironmentFile of a unit."""
    return "\n".join([HEADER, *(f"{key}={_quoted(value)}" for key, value in sorted(unit["env"].items()))]) + "\n"


def systemd_target() -> str:
    """Return the umbrella target of a host's units."""
    return f"""{HEADER}
[Unit]
Description=LLM serving with prefill and decode disaggregated

[Install]
WantedBy=multi-user.target
"""


def rendered_files(plan: Mapping[str, Any], host: str) -> Dict[str, str]:
    """Return every file that the host's services are made of, by name: systemd's and supervisord's, from one entry."""
    state_dir = plan["hosts"][host]["state_dir"]
    files = {"pd.target": systemd_target(), "supervisord.conf": supervisor_conf(state_dir, socket_path(state_dir))}
    for unit in host_units(plan, host):
        files[f"{unit['name']}.service"] = systemd_unit(unit, state_dir, plan["ratio"])
        files[f"{unit['name']}.env"] = systemd_env(unit)
        files[f"{unit['name']}.conf"] = supervisor_program(unit, state_dir)
        files[f"{unit['name']}.sh"] = run_script(unit, state_dir)
    return {**files, **firewall.rendered(plan, host)}
