"""The dead man's switch: a process of its own that takes `/slow_down` back when whoever asked for it is gone.

    python -m pdbench.profiling.guard < orders

The first line of its input is JSON: `{"urls": [...], "key_file": FILE or null, "within_s": seconds}`. Then it waits: for the line
`released` (all is well), for the end of its input (who started it has died, whatever killed it), for SIGTERM, or for `within_s`
to pass. In all cases but the first it tells every worker to run at full speed, until each has said yes or is gone.
"""

from __future__ import annotations

import json
import select
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

#: a sleeping scheduler answers when it wakes up
_ANSWER_S, _AGAIN_S, _GIVE_UP_S = 120.0, 1.0, 900.0
_FULL_SPEED = json.dumps({"forward_sleep_time": None}).encode()


class _AskedToEndError(Exception):
    """SIGTERM."""


def release(url: str, headers: Mapping[str, str]) -> bool:
    """Tell a worker to run at full speed; return whether it is done with: it said yes, refused for good, or is gone."""
    request = urllib.request.Request(f"{url}/slow_down", _FULL_SPEED, {"Content-Type": "application/json", **headers})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_ANSWER_S):
            return True
    except urllib.error.HTTPError as why:
        # 401: nothing that we hold will do; 500 and 503 may pass
        return why.code < 500
    except urllib.error.URLError as why:
        return isinstance(why.reason, ConnectionRefusedError)
    except OSError:
        return False


def main() -> int:
    """Wait, and release; return 0 when nobody is left slowed."""
    orders = json.loads(sys.stdin.readline())

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _AskedToEndError

    signal.signal(signal.SIGTERM, end)
    # Ctrl-C at the terminal is for who started us; we see its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    why = "its time is up"
    try:
        if select.select([sys.stdin], [], [], orders["within_s"])[0]:
            if sys.stdin.readline().strip() == "released":
                return 0
            why = "who slowed them down is gone"
    except _AskedToEndError:
        why = "it was asked to end"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"pdbench profile: {why}: workers run at full speed again", file=sys.stderr, flush=True)
    headers = {}
    if orders["key_file"]:
        headers = {"Authorization": f"Bearer {Path(orders['key_file']).read_text(encoding='utf-8').strip()}"}
    left, until = list(orders["urls"]), time.monotonic() + _GIVE_UP_S
    while left and time.monotonic() < until:
        left = [url for url in left if not release(url, headers)]
        if left:
            time.sleep(_AGAIN_S)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
