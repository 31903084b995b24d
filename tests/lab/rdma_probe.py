"""Runs in the VM of rdma_vm.sh: both ends of the KV path probe over its RDMA device, by one transfer engine after the other."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from probe_ends import Ends, pair, task

ADDRESS, DEVICE = "10.0.0.1", "rxe0"
#: As the plan makes it for such a host, without its TCP device; two processes of one machine would share memory without UCX_TLS.
ENV = {"nixl": {"UCX_NET_DEVICES": f"{DEVICE}:1", "UCX_TLS": "rc"}, "mooncake": {"MC_GID_INDEX": "1"}}
#: Seconds: the machine is emulated, and slow.
SLOW = "tool.ONE_S, tool.PAIR_S = 60.0, 240.0"
PATIENCE_S = 250


def tried(backend: str) -> dict[str, Any]:
    """What the end that moves says of its pair."""
    folder = Path("/tmp") / backend
    folder.mkdir()
    about: dict[str, Any] = {"address": ADDRESS, "listen": ADDRESS, "patience_s": PATIENCE_S, "ib_device": DEVICE}
    ends = Ends(folder, sys.executable, {**os.environ, **ENV[backend]})
    try:
        port = ends.waiting(task(folder, "wait", backend, **about), SLOW)
        move = task(folder, "move", backend, pairs=[pair(port, address=ADDRESS)], **about)
        ends.start(move, SLOW).wait(PATIENCE_S + 30)
        said: dict[str, Any] = json.loads(Path(move["progress"]).read_text())
    finally:
        ends.close()
    for log in sorted(folder.glob("*.out")):
        print(f"{log.name}: {log.read_text()[-500:]}")
    return dict(said["results"][0])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"=={name}=={json.dumps(tried(name))}==end==", flush=True)
