"""What a host has: GPUs, RDMA devices, addresses, service manager."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

from . import doctor_look, firewall_host, rdma
from .errors import UserError

Json = Dict[str, Any]


#: How nvidia-smi ends where there is a driver and no GPU.
_NO_DEVICES = 6


def parse_gpus(text: str) -> List[Json]:
    """Return the GPUs from ``nvidia-smi --query-gpu=index,name,memory.total,pci.bus_id --format=csv,noheader,nounits``.

    ``memory_mib`` is 0 for a GPU that shares the host's memory and says ``[N/A]``.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    return [
        {
            "index": int(row[0]),
            "name": row[1],
            "memory_mib": int(row[2]) if row[2].isdigit() else 0,
            "pci": rdma.normal_pci(row[3]) if len(row) > 3 else "",
        }
        for row in rows
    ]


def gpus() -> List[Json]:
    """Return the host's NVIDIA GPUs, none where there is no driver; raise UserError where there is one that does not work."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,pci.bus_id", "--format=csv,noheader,nounits"]
    # Without persistence mode a driver wakes every GPU first.
    code, out, err = doctor_look.run(query, 60)
    if code not in (0, _NO_DEVICES):
        said = " ".join((out.strip() or err).split())[:200]
        raise UserError(
            f"nvidia-smi fails (exit {code}: {said}): the driver needs repair, often a reboot, before GPUs can be used"
        )
    return parse_gpus(out) if code == 0 else []


def addresses() -> Dict[str, str]:
    """Return the host's IPv4 and IPv6 addresses, each with its network device."""
    tool = shutil.which("ip")
    if not tool:
        return {}
    done = subprocess.run([tool, "-o", "addr", "show"], capture_output=True, text=True, check=False)
    found: Dict[str, str] = {}
    for words in (line.split() for line in done.stdout.splitlines()):
        if len(words) > 3:
            found.setdefault(words[3].split("/")[0], words[1].rstrip(":").partition("@")[0])
    return found


def default_address() -> str:
    """Return the address from which the host reaches others ("" without a route); no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        return str(sock.getsockname()[0])


def service_manager() -> str:
    """Return ``systemd`` where it is PID 1 and we are root, else ``supervisord``."""
    try:
        first = Path("/proc/1/comm").read_text().strip()
    except OSError:
        first = ""
    return "systemd" if first == "systemd" and os.geteuid() == 0 else "supervisord"


#: What a Python says of itself: run by this one, or by the one that makes the host's virtualenvs.
_PYTHON = """
import json, platform, sys
libc, version = platform.libc_ver()
print(json.dumps({"path": sys.executable, "version": platform.python_version(), "machine": platform.machine(),
                  "glibc": version if libc == "glibc" else ""}))
"""


def python(path: str) -> Json:
    """Return ``path``, ``version``, ``machine`` and ``glibc`` of the Python that makes virtualenvs ("": this one)."""
    if not path:
        libc, version = platform.libc_ver()
        glibc = version if libc == "glibc" else ""
        return {"path": sys.executable, "version": platform.python_version(), "machine": platform.machine(), "glibc": glibc}
    try:
        done = subprocess.run([path, "-c", _PYTHON], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        return {**json.loads(done.stdout), "path": path}
    except (OSError, subprocess.SubprocessError, ValueError):
        raise UserError(f"venv_python={path}: there is no such Python on the host") from None


def newer_pythons() -> List[str]:
    """Return other Pythons in the PATH that our virtualenvs can be made with, newest first."""
    found = [shutil.which(f"python3.{minor}") for minor in (13, 12, 11)]
    return [path for path in found if path]


def installed(install_dir: str) -> Dict[str, str]:
    """Return the stamps of the virtualenvs that are there, by name."""
    return {path.parent.name: path.read_text() for path in sorted(Path(install_dir).glob("*/.pd-stamp"))}


def gather(accelerators: bool, python_path: str = "", model: str = "") -> Json:
    """Return the facts that the plan reads; GPUs and RDMA devices only where the engine uses real ones.

    ``model``: a path of which is said whether it is there ("": it is not looked for). ``gpu_fault`` is there where GPUs cannot be
    asked for, and says why.
    """
    found: Json = {"service_manager": service_manager(), "python": {**python(python_path), "others": newer_pythons()}}
    if model.startswith("/"):
        found["model"] = Path(model).exists()
    found["port_range"] = doctor_look.port_range(doctor_look.ROOT)
    found["nft"] = bool(firewall_host.find_nft())
    if firewall_host.owner():
        found["firewall"] = firewall_host.owner()
    known = addresses()
    if known:
        found.update({"addresses": list(known), "netdevs": known})
    if default_address():
        found["default_address"] = default_address()
    if accelerators:
        try:
            cards = gpus()
        except UserError as error:
            cards, found["gpu_fault"] = [], str(error)
        # nvidia-smi says which GPU has which index; without it (an NPU host, say) there is none to be near to.
        rows = rdma.ports(cards={card["index"]: card["pci"] for card in cards if card["pci"]})
        found.update({"gpu_cards": cards, "gpus": [card["index"] for card in cards]})
        found.update({"rdma": rdma.by_device(rows), "peermem": rdma.peermem()})
    return found
