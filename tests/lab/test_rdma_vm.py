"""A real RDMA device, SoftRoCE in a VM emulated in software (rdma_vm.sh): its facts, and the KV path probe over it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from pdlib import probe_verdict, rdma

REPO = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("rdma_vm.sh")
NEEDS = {"qemu-system-x86": "qemu-system-x86_64", "mmdebstrap": "mmdebstrap", "cpio": "cpio"}
#: In the VM: its sysfs as it stands, a ping-pong over the GID that is right, and its sysfs once the link is down.
COMMANDS = """
dump() {
    rm -rf /t; mkdir -p /t/sys/class/infiniband /t/sys/class/net /t/sys/devices/virtual/net /t/proc/sys/kernel
    cp -a /sys/devices/virtual/infiniband /t/sys/devices/virtual/ 2>/dev/null
    cp -a /sys/devices/virtual/net/eth0 /t/sys/devices/virtual/net/ 2>/dev/null
    cp -a /sys/class/infiniband/rxe0 /t/sys/class/infiniband/; cp -a /sys/class/net/eth0 /t/sys/class/net/
    cp /proc/sys/kernel/osrelease /t/proc/sys/kernel/
    echo "==$1=="; tar czf - -C /t . | base64; echo "==end=="
}
dump up
ibv_devinfo -d rxe0 -v
ibv_rc_pingpong -d rxe0 -g 1 -n 50 >/dev/null & sleep 3; ibv_rc_pingpong -d rxe0 -g 1 -n 50 10.0.0.1; echo "ping-pong: $?"
ip link set eth0 down; sleep 1
dump down
"""


def unfit() -> str:
    if os.geteuid():
        return "the VM is made by root"
    missing = [package for package, command in NEEDS.items() if not shutil.which(command)]
    return f"the VM needs Debian packages: {' '.join(missing)} (make test-rdma installs them)" if missing else ""


@pytest.fixture(autouse=True)
def whole() -> None:
    """No hosts of the lab are needed here."""


def _tree(said: str, name: str, folder: Path) -> Path:
    text = said.split(f"=={name}==")[1].split("==end==")[0]
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode("".join(text.split())))) as archive:
        archive.extractall(folder, filter="tar")
    return folder


@pytest.mark.skipif(bool(unfit()), reason=unfit())
def test_a_real_device_is_read_as_its_own_tools_read_it(tmp_path: Path) -> None:
    done = subprocess.run([SCRIPT, COMMANDS], capture_output=True, text=True, check=False, timeout=850)
    said = done.stdout.replace("\r", "")
    assert "==down==" in said, said[-2000:] + done.stderr[-2000:]
    root = _tree(said, "up", tmp_path / "up")
    (row,) = rdma.ports(root)
    assert (row["device"], row["port"], row["state"], row["phys_state"]) == ("rxe0", 1, "ACTIVE", "LinkUp")
    assert (row["fabric"], row["netdev"], row["mtu"], row["pci"], row["function"]) == ("roce", "eth0", 1500, "", "")
    # ibv_devinfo -v lists the same GIDs: "GID[  1]:  ::ffff:10.0.0.1, RoCE v2"
    listed = re.findall(r"GID\[\s*(\d+)\]:\s*(\S+), (.+)", said)
    assert [(str(gid["index"]), gid["address"], gid["type"]) for gid in row["gids"]] == [
        (index, address.removeprefix("::ffff:"), kind.strip()) for index, address, kind in listed
    ]
    # The GID that is chosen is the one that the ping-pong was run over.
    assert rdma.gid_index(row["gids"], "10.0.0.1")[0] == 1
    assert rdma.gid_index(row["gids"])[0] == 1
    assert "ping-pong: 0" in said
    assert rdma.peermem(root)["module"] == ""
    assert rdma.peermem(root)["kernel"]
    (row,) = rdma.ports(_tree(said, "down", tmp_path / "down"))
    assert (row["state"], row["fabric"]) == ("DOWN", "roce")


#: What of an engine's virtualenv the transfer engines are; Mooncake's variant for CPUs uses the system's libibverbs.
PACKAGES = (
    *("nixl", "nixl_cu13", "nixl_cu13.libs", ".nixl_cu13.mesonpy.libs", "nixl*.dist-info", "nixl_meta_utils.py"),
    *("mooncake", "mooncake_*", "numpy", "numpy.libs"),
)
#: NIXL's wheel has a libibverbs of its own, with a driver of mlx5 alone: here it gets the system's, which knows rxe.
PROBE = """
for library in /site/nixl_cu13.libs/libibverbs-*; do ln -sf /usr/lib/x86_64-linux-gnu/libibverbs.so.1 $library; done
ulimit -l unlimited
PYTHONPATH=/site python3 /probe/tests/rdma_probe.py mooncake nixl
"""


def _added(folder: Path) -> Path:
    """What the VM has beside its own: transfer engines that a deployment of the real engine has installed, and the probe."""
    sites = sorted(REPO.glob(".pd/install-cpu/sglang-[0-9]*/lib/python3.*/site-packages"))
    if not sites:
        pytest.skip("no transfer engines to try: make test-real installs them")
    found = [path for name in PACKAGES for path in sites[-1].glob(name)]
    assert {"nixl_cu13", "mooncake"} <= {path.name for path in found}
    added = {f"site/{path.name}": path for path in found}
    added |= {f"probe/tests/{path.name}": path for path in (REPO / "tests/probe_ends.py", REPO / "tests/lab/rdma_probe.py")}
    tool = "library/module_utils/pdlib/probe_tool.py"
    for name, path in {**added, f"probe/{tool}": REPO / tool}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path)
    return folder


@pytest.mark.skipif(bool(unfit()), reason=unfit())
def test_the_transfer_engines_move_bytes_over_a_real_device(tmp_path: Path) -> None:
    env = {**os.environ, "RDMA_VM_ADD": str(_added(tmp_path)), "RDMA_VM_MB": "4000", "RDMA_VM_TIMEOUT": "800"}
    done = subprocess.run([SCRIPT, PROBE], capture_output=True, text=True, check=False, timeout=1150, env=env)
    said = done.stdout.replace("\r", "")
    ends = {name: {"host": name, "address": "10.0.0.1", "python": "python3", "gpu": None} for name in ("p", "d")}
    for backend in ("mooncake", "nixl"):
        assert f"=={backend}==" in said, said[-3000:] + done.stderr[-2000:]
        result = json.loads(said.split(f"=={backend}==")[1].split("==end==")[0])
        work = {"backend": backend, "op": "write", "ends": ends}
        verdict = probe_verdict.judge(work, {"from": "p", "to": "d", "expected": "rdma"}, result)
        assert (verdict["ok"], verdict["seen"]) == (True, "rdma"), verdict
        print(f"{backend} over rxe0: {result['bytes'] >> 20} MiB, {result['gb_s'] * 1e3:.1f} MB/s, {result['latency_us']:.0f} us")
