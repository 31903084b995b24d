"""The deployed 1p1d beside the same one started by hand, on the same GPUs in the same minutes: processes, then paired runs."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import compare as maths

from pdlib import processes

Json = dict[str, Any]
SCRIPT = Path(__file__).with_name("by_hand.sh")
#: The router's port of the one that is started by hand; its servers follow.
PORT = 8500
#: What the servers of `sglang` say of how they run that two servers of one machine cannot share.
_OWN = ("port", "nccl_port", "startup_time", "internal_states", "launch_command", "scheduler_info")


def compare(out: Path, plan: Json, python: str, load: list[str], pairs: int, say: Callable[[str], None]) -> bool:
    """Start it, compare, and stop it; ``python`` has pdbench. Return whether both could be compared."""
    folder = out / "by-hand"
    folder.mkdir(parents=True, exist_ok=True)
    workers = {worker["role"]: worker for worker in plan["workers"]}
    gpus = [str(workers[role]["ranks"][0]["gpus"][0]) for role in ("prefill", "decode")]
    env = {**os.environ, "ROUTER_PYTHON": plan["router"]["argv"][0]}
    began = time.monotonic()
    subprocess.run([str(SCRIPT), "start", str(folder), *gpus, str(PORT)], check=True, env=env)
    try:
        if not _ready(folder, say):
            return False
        say(f"by hand: ready after {time.monotonic() - began:.0f} s on GPUs {', '.join(gpus)}")
        found = {"processes": _processes(folder, plan), "servers": _servers(plan)}
        (folder / "processes.json").write_text(json.dumps(found, indent=1) + "\n")
        for name, both in found["processes"].items():
            say(f"{name}: flags {json.dumps(both['flags'])}")
            say(f"{name}: environment {json.dumps(both['environment'])}")
        for role, both in found["servers"].items():
            say(f"{role}: of {both['keys']} settings that the servers report, these differ: {json.dumps(both['differ'])}")
        return _pairs(folder, plan["router"]["url"], python, load, pairs, say)
    finally:
        subprocess.run([str(SCRIPT), "stop", str(folder)], check=False, env=env)


def _get(url: str, timeout_s: float = 5.0) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        body: bytes = answer.read()
        return body


def _ready(folder: Path, say: Callable[[str], None], timeout_s: float = 180.0) -> bool:
    end = time.monotonic() + timeout_s
    url = f"http://127.0.0.1:{PORT}"
    body = json.dumps({"input_ids": [300, 301, 302], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}).encode()
    while time.monotonic() < end:
        dead = [
            name for name in ("prefill", "decode", "router") if not processes.alive(int((folder / f"{name}.pid").read_text()))
        ]
        if dead:
            say(f"by hand: {dead[0]} died: {(folder / f'{dead[0]}.log').read_text(errors='replace')[-1500:]}")
            return False
        try:
            _get(f"{url}/readiness")
            request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60):
                return True
        except OSError:
            time.sleep(1)
    say(f"by hand: not ready after {timeout_s:.0f} s")
    return False


def _of(pid: int) -> tuple[list[str], dict[str, str]]:
    """Return a process's command line and environment as the kernel has them; a router has put a title over both."""
    folder = Path("/proc") / str(pid)
    return _words(folder / "cmdline"), maths.environment((folder / "environ").read_bytes())


def _words(path: Path) -> list[str]:
    return [word for word in path.read_bytes().decode(errors="replace").split("\0") if word]


def _processes(folder: Path, plan: Json) -> Json:
    """Return, by process, flags and variables that differ: [deployed, by hand]."""
    found: Json = {}
    host = plan["hosts"][plan["router"]["host"]]
    units = {worker["role"]: worker["ranks"][0] for worker in plan["workers"]} | {"router": plan["router"]}
    for name, entry in units.items():
        ours = processes.ours(host["state_dir"], entry["unit"].removesuffix(".service"))
        deployed, env = _of(min(process.pid for process in ours))
        seen, hand_env = _of(int((folder / f"{name}.pid").read_text()))
        hand = _words(folder / f"{name}.argv")
        found[name] = {
            "deployed": deployed,
            "by_hand": seen,
            "started_by_hand": hand,
            "plan": entry["argv"],
            "flags": maths.differences(maths.flags(entry["argv"]), maths.flags(hand)),
            "environment": maths.differences(env, hand_env),
        }
    return found


def _servers(plan: Json) -> Json:
    """Return, by role, the resolved settings that differ between the servers: [deployed, by hand]."""
    found: Json = {}
    for offset, role in ((1, "prefill"), (2, "decode")):
        url = next(worker["url"] for worker in plan["workers"] if worker["role"] == role)
        both = [json.loads(_get(f"{where}/server_info")) for where in (url, f"http://127.0.0.1:{PORT + offset}")]
        kept = [{key: value for key, value in info.items() if key not in _OWN} for info in both]
        found[role] = {"keys": len(kept[0]), "differ": maths.differences(*kept)}
    return found


def _pairs(folder: Path, url: str, python: str, load: list[str], pairs: int, say: Callable[[str], None]) -> bool:
    """Measure both in turn, the first of a pair by turns; write pairs.json and ratios.json."""
    urls = {"deployed": url, "by-hand": f"http://127.0.0.1:{PORT}"}
    rows: list[Json] = []
    for number in range(-1, pairs):
        order = ["deployed", "by-hand"] if number % 2 == 0 else ["by-hand", "deployed"]
        row: Json = {"pair": number, "first": order[0]}
        for which in order:
            target = folder / "runs" / f"{number}-{which}"
            # The same prompts for both of a pair, new ones for the next: what a prefix cache holds is nobody's advantage.
            command = [python, "-m", "pdbench", "run", "--url", urls[which], "--api", "generate", *load]
            command += ["--seed", str(100 + number), "--output", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode not in (0, 3):
                say(f"pair {number}, {which}: could not be measured: {done.stderr.strip()[-500:]}")
                return False
            summary = json.loads((target / "summary.json").read_text())
            row[which] = {"output_throughput": summary["output_throughput"], "valid": summary["valid"],
                          "reasons": summary["invalid_reasons"], "failed": summary["failed"]}  # fmt: skip
            for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
                row[which] |= {f"{name[:-3]}_{part}_ms": summary[name][part] for part in ("mean", "p50", "p99")}
        # The first pair of all is for caches and clocks.
        if number >= 0:
            rows.append(row)
    (folder / "pairs.json").write_text(json.dumps(rows, indent=1) + "\n")
    good = [row for row in rows if row["deployed"]["valid"] and row["by-hand"]["valid"]]
    say(f"{len(good)} of {len(rows)} pairs are valid on both sides")
    for row in rows:
        for which in urls:
            if not row[which]["valid"]:
                say(f"pair {row['pair']}, {which}: invalid: {row[which]['reasons']}")
    if not good:
        return False
    names = [name for name in good[0]["deployed"] if name.endswith(("throughput", "_ms"))]
    ratios = {name: maths.ratio((row["deployed"][name], row["by-hand"][name]) for row in good) for name in names}
    (folder / "ratios.json").write_text(json.dumps(ratios, indent=1) + "\n")
    for name, found in ratios.items():
        interval = f"{found['low']:.4f} to {found['high']:.4f}" if found["low"] is not None else "one pair"
        say(f"deployed / by hand, {name}: {found['ratio']:.4f} ({interval})")
    return True
