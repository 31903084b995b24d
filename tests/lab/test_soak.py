"""Load for a long time, and faults from a seeded schedule: every request is accounted for, and nothing grows.

`make soak MINUTES=45` (docs/results/soak.md); `MINUTES=3` for a look, which goes to .pd/soak. The pure parts: soak.py.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet
import pytest
from lab import hosts, network, soak, soak_report
from lab.common import REPO, LabError, address, children, leader
from lab.controller import Controller, complete, counts, pids, sh
from lab.soak import Fault, Window
from lab.soak_report import Sample
from lab.test_rebalance import beginning

MINUTES = float(os.environ.get("PD_SOAK_MINUTES") or 0)
SEED = int(os.environ.get("PD_SOAK_SEED") or 1)
RATE = float(os.environ.get("PD_SOAK_RATE") or 15)
#: Shorter ones are a look, and judge no growth: a process of some minutes is still warming up.
WHOLE_MIN = 20.0
HOSTS = ("h1", "h2", "h3")
#: The router on h3 would be under libfaketime, too.
CLOCKS = ("h1", "h2")
FULL = {"prefill": 3, "decode": 3}
#: Of one request, in seconds.
TIMEOUT_S = 20.0
#: What the client's begin is known to, and how long connections of a fault's last moments take to settle.
SLACK_S, SETTLE_S = 1.0, 4.0
HEAL_S = 240.0
#: So small a prefix cache is full within two minutes: what fills it is no leak.
CACHE = json.dumps({"engine_args": {"max-total-tokens": 20000}})
SAMPLE_S = 5.0
CLOCK = "/run/pd-soak-clock"
DROP_IN = "/etc/systemd/system/pd-.service.d"
AGAIN = "systemctl daemon-reload && systemctl restart 'pd-*.service'"
#: All files of the state directory on a file system that has room for nothing else.
FILL = """
set -e
rm -rf /run/soak-copy; cp -a /var/lib/pd /run/soak-copy
mount -t tmpfs -o size=$(( $(du -sk /run/soak-copy | cut -f1) + 512 ))k,mode=711 tmpfs /var/lib/pd
cp -a /run/soak-copy/. /var/lib/pd/; rm -rf /run/soak-copy
head -c 1G /dev/zero >/var/lib/pd/filler 2>/dev/null || true
if head -c 64K /dev/zero >/var/lib/pd/more 2>/dev/null; then echo "there is room left"; exit 1; fi
"""
asked_for = pytest.mark.skipif(not MINUTES, reason="as long as one likes: make soak MINUTES=45")


# -- processes, as this machine sees them


def processes() -> dict[str, list[int]]:
    """Return the processes of every unit of ours on the hosts: "h1 pd-prefill-0" -> pids of this machine."""
    spaces = {os.readlink(f"/proc/{first}/ns/pid"): host for host in HOSTS if (first := leader(host))}
    found: dict[str, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            host = spaces.get(os.readlink(folder / "ns/pid"))
            unit = re.search(r"/(pd-[\w-]+)\.service", (folder / "cgroup").read_text()) if host else None
        except OSError:
            continue
        if unit:
            found.setdefault(f"{host} {unit[1]}", []).append(int(folder.name))
    return found


def descendants(pid: int) -> list[int]:
    """Return a process and all below it."""
    return [pid, *(below for kid in children(pid) for below in descendants(kid))]


def sampled(name: str, own: list[int], t_s: float) -> Sample | None:
    """Return what processes hold together; None when one of them has just ended."""
    memory = descriptors = threads = 0
    try:
        for pid in own:
            status = Path(f"/proc/{pid}/status").read_text()
            memory += int((re.search(r"^RssAnon:\s+(\d+)", status, re.M) or ["", "0"])[1])
            threads += int((re.search(r"^Threads:\s+(\d+)", status, re.M) or ["", "0"])[1])
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    return Sample(round(t_s, 2), name, min(own), memory / 1024, descriptors, threads)


@contextmanager
def sampling(client: int, start: float) -> Iterator[list[Sample]]:
    """Sample client, router and workers for as long as the block lasts."""
    samples, stop = list[Sample](), threading.Event()

    def loop() -> None:
        while not stop.wait(SAMPLE_S):
            now = time.perf_counter() - start
            for name, own in {"client": descendants(client), **processes()}.items():
                one = sampled(name, own, now)
                if one and one.memory:
                    samples.append(one)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join(30)


@contextmanager
def loading(folder: Path, requests: int) -> Iterator[subprocess.Popen[str]]:
    """`pdbench run` at a constant rate through the router, from the controller's end of the bridge."""
    command = [str(Path(sys.executable).with_name("pdbench")), "run", "--url", f"http://{address('h3')}:8000"]
    command += ["--api", "completions", "--model", "emulated/qwen2.5-3b", "--request-rate", str(RATE), "--arrival", "constant"]
    command += [
        "--num-requests",
        str(requests),
        "--isl",
        "64",
        "--osl",
        "8",
        "--timeout",
        str(TIMEOUT_S),
        "--output",
        str(folder),
    ]
    with open(folder.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            hosts.on_switch(command),
            cwd=REPO,
            text=True,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# -- faults


@contextmanager
def clocks_that_can_be_stepped() -> Iterator[None]:
    """Workers of CLOCKS see the time with what CLOCK says added; their monotonic clock stays."""
    library = sh("h1", "ls /usr/lib/*/faketime/libfaketime.so.1")
    env = f"LD_PRELOAD={library} FAKETIME_TIMESTAMP_FILE={CLOCK} FAKETIME_CACHE_DURATION=1 DONT_FAKE_MONOTONIC=1"
    try:
        for host in CLOCKS:
            sh(host, f"echo +0 >{CLOCK}; chmod 644 {CLOCK}; mkdir -p {DROP_IN}")
            sh(host, f"printf '[Service]\\nEnvironment={env}\\n' >{DROP_IN}/soak.conf && {AGAIN}")
        yield
    finally:
        for host in CLOCKS:
            sh(host, f"rm -rf {DROP_IN} {CLOCK} && {AGAIN}", check=False)


def within(timeout_s: float, holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold in time; what raises an error of the network does not hold yet."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if holds():
                return True
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            pass
        time.sleep(0.3)
    return False


def serves() -> bool:
    """Whether the router counts all workers and answers twelve requests in a row: every worker has some."""
    return counts() == FULL and all(complete()["choices"] for _ in range(12))


def make(fault: Fault) -> None:
    """Let the fault begin."""
    one = fault.where[0]
    match fault.kind:
        case "kill":
            host, unit = one.split("/")
            sh(host, f"systemctl kill -s KILL {unit}")
        case "partition":
            network.partition(*fault.where)
        case "slow":
            network.shape(one, *soak.SLOW[int(fault.how)])
        case "disk":
            sh(one, FILL)
        case "clock":
            sh(one, f"echo {fault.how} >{CLOCK}")


def undo(fault: Fault, before: int) -> bool:
    """Let it end; whether that came about. ``before``: the main process of the unit that was killed."""
    one = fault.where[0]
    match fault.kind:
        case "kill":
            host, unit = one.split("/")
            back = within(60, lambda: pids(host).get(one, 0) not in (0, before))
            # five starts in half an hour are all that systemd allows
            sh(host, f"systemctl reset-failed {unit}", check=False)
            return back
        case "partition":
            network.heal()
        case "slow":
            network.unshape(one)
        case "disk":
            sh(one, "umount -l /var/lib/pd")
        case "clock":
            sh(one, f"echo +0 >{CLOCK}")
    return True


def run_through(faults: list[Fault], start: float, seconds: float, alive: Callable[[], bool]) -> list[Window]:
    """Make one fault after the other, each once the one before is healed; the first that does not heal is the last."""
    windows: list[Window] = []
    for fault in faults:
        free = windows[-1].healed_s + soak.GAP_S if windows and windows[-1].healed_s is not None else 0.0
        time.sleep(max(0.0, max(fault.at_s, free) - (time.perf_counter() - start)))
        begin = time.perf_counter() - start
        if begin + fault.lasts_s > seconds - soak.TAIL_S or not alive():
            break
        try:
            before = pids(fault.where[0].split("/")[0]).get(fault.where[0], 0) if fault.kind == "kill" else 0
            make(fault)
            time.sleep(fault.lasts_s)
            healed = undo(fault, before) and within(HEAL_S, serves)
        except LabError as why:
            # what was measured so far is worth its report
            print(why)
            healed = False
            # the next module of a session deploys on these hosts
            if fault.kind == "disk":
                sh(fault.where[0], "umount -l /var/lib/pd", check=False)
            elif fault.kind != "kill":
                with contextlib.suppress(LabError):
                    undo(fault, 0)
        end = time.perf_counter() - start
        windows.append(Window(fault, begin - SLACK_S, end + SLACK_S + SETTLE_S if healed else None))
        outcome = f"{end - begin:.1f} s" if healed else "NOT HEALED"
        print(f"{begin:7.1f} s  {fault.kind} {' '.join(fault.where)} {fault.how}: {outcome}", flush=True)
        if not healed:
            break
    return windows


@asked_for
def test_nothing_is_lost_and_nothing_grows(pd: Controller, tmp_path: Path) -> None:
    seconds, folder = MINUTES * 60, tmp_path / "run"
    pd.play("deploy_pd.yml", "-e", "ratio=3p3d", "-e", CACHE).good()
    with clocks_that_can_be_stepped():
        assert within(120, serves), "it does not serve under libfaketime"
        units = sorted(name for name in pids(*HOSTS) if "router" not in name)
        assert len(units) == 6, units
        seen = processes()
        assert len(seen) == 7, sorted(seen)
        faults = soak.schedule(SEED, seconds, units, HOSTS, CLOCKS)
        asked = int(RATE * seconds)
        with loading(folder, asked) as load:
            start = beginning(folder)
            with sampling(load.pid, start) as samples:
                windows = run_through(faults, start, seconds, lambda: load.poll() is None)
                rest = seconds - (time.perf_counter() - start)
                code = load.wait(max(0.0, rest) + TIMEOUT_S + 120)
        assert code in (0, 3), folder.with_suffix(".log").read_text()[-3000:]
        healed = within(HEAL_S, serves)
    table = pyarrow.parquet.read_table(folder / "requests.parquet", columns=["phase", *soak.COLUMNS])
    rows = [row for row in table.to_pylist() if row["phase"] == "measure"]
    done = soak_report.Soak(
        SEED, MINUTES, RATE, len(faults), windows, soak.account(rows, asked, windows, TIMEOUT_S),
        # once all is sent, the client reads everything again, for its summary
        [sample for sample in samples if sample.t_s <= seconds],
        [(row["scheduled_s"], row["ok"]) for row in rows],
        min(180.0, seconds / 4), time.strftime("%Y-%m-%d"),
    )  # fmt: skip
    out = REPO / "docs" / "results" if MINUTES >= WHOLE_MIN else REPO / ".pd" / "soak"
    soak_report.write(done, out)
    print(soak_report.page(done))
    print(f"written: {out}/soak.md")
    assert healed
    assert all(window.healed_s is not None for window in windows)
    assert done.account.closed, done.account
    # A full state directory or a clock that jumps is nothing that a request depends on.
    harmless = {"disk", "clock"}
    assert not [row for row in done.account.failed if set(row[0].split(" and ")) <= harmless], done.account.failed
    assert {window.fault.kind for window in windows} == set(soak.KINDS) or MINUTES < 10
    assert MINUTES < WHOLE_MIN or done.leaks() == []
