"""The load generators: how each is called, and where it writes its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: Virtualenvs of the peers, the truth server, the tokenizer
HOME = ROOT / ".pd" / "yardstick"
ISL, OSL = 64, 128


@dataclass(frozen=True)
class Figures:
    """What a tool reports: requests done, TTFT and ITL in ms, and what it says of odd framing ("": nothing)."""

    completed: int
    ttft_ms: float
    ttft_p99_ms: float
    itl_ms: float
    says: str = ""


@dataclass(frozen=True)
class Tool:
    """One load generator.

    ``command(url, concurrency, requests, out)`` is what is typed; ``read(out)`` finds its figures. ``problem()`` says why it
    cannot be run here, "" when it can.
    """

    name: str
    command: Callable[[str, int, int, Path], list[str]]
    read: Callable[[Path], Figures]
    problem: Callable[[], str]


def _pdbench(*options: str) -> Callable[[str, int, int, Path], list[str]]:
    def command(url: str, concurrency: int, requests: int, out: Path) -> list[str]:
        argv = [sys.executable, "-m", "pdbench", "run", "--url", url, "--model", "m", "--output", str(out), "--warmup", "0"]
        argv += ["--concurrency", str(concurrency), "--num-requests", str(requests), "--isl", str(ISL), "--osl", str(OSL)]
        return [*argv, *options]

    return command


def _read_pdbench(out: Path) -> Figures:
    found = json.loads((out / "summary.json").read_text())
    ttft = found["ttft_ms"]
    notes = [note for note in found["points"][0].get("notes", []) if "tokens on average" in note or "events on average" in note]
    itl = (found.get("itl_token_ms") or found["itl_ms"])["mean"]
    return Figures(found["completed"], ttft["mean"], ttft["p99"], itl, "; ".join(notes))


def _no_such_option(option: str) -> Callable[[], str]:
    def problem() -> str:
        told = subprocess.run([sys.executable, "-m", "pdbench", "run", "--help"], capture_output=True, text=True, check=False)
        return "" if option in told.stdout else f"`pdbench run` has no {option}"

    return problem


def _sglang(script: str) -> Callable[[str, int, int, Path], list[str]]:
    def command(url: str, concurrency: int, requests: int, out: Path) -> list[str]:
        argv = [str(HOME / "sglang" / "bin" / "python"), str(HERE / "peers" / script), "--backend", "sglang-oai"]
        argv += ["--base-url", url, "--model", "m", "--tokenizer", str(HOME / "tokenizer"), "--dataset-name", "random-ids"]
        argv += ["--random-input-len", str(ISL), "--random-output-len", str(OSL), "--random-range-ratio", "1", "--disable-tqdm"]
        argv += ["--num-prompts", str(requests), "--max-concurrency", str(concurrency), "--warmup-requests", "0"]
        return [*argv, "--output-file", str(out)]

    return command


def _floor(mode: str) -> Callable[[str, int, int, Path], list[str]]:
    def command(url: str, concurrency: int, requests: int, out: Path) -> list[str]:
        script = [str(HOME / "sglang" / "bin" / "python"), str(HERE / "peers" / "floor.py")]
        return [*script, mode, url, str(concurrency), str(requests), str(out)]

    return command


def _read_line(out: Path) -> Figures:
    found = json.loads(out.read_text().strip().splitlines()[-1])
    return Figures(found["completed"], found["mean_ttft_ms"], found["p99_ttft_ms"], found["mean_itl_ms"])


def _aiperf(url: str, concurrency: int, requests: int, out: Path) -> list[str]:
    argv = [str(HOME / "aiperf" / "bin" / "aiperf"), "profile", "--model", "m", "--url", url, "--endpoint-type", "completions"]
    argv += ["--streaming", "--tokenizer", "yard/tok", "--isl", str(ISL), "--osl", str(OSL), "--concurrency", str(concurrency)]
    argv += ["--request-count", str(requests), "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"]
    return [*argv, "--artifact-dir", str(out)]


def _read_aiperf(out: Path) -> Figures:
    found: dict[str, Any] = json.loads((out / "profile_export_aiperf.json").read_text())
    ttft, itl = found["time_to_first_token"], found["inter_token_latency"]
    return Figures(int(found["request_count"]["avg"]), ttft["avg"], ttft["p99"], itl["avg"])


def _not_there(venv: str, needed: str) -> Callable[[], str]:
    def problem() -> str:
        why = HOME / f"{venv}.failed"
        if why.exists():
            return f"it could not be installed: {why.read_text().strip()}"
        return "" if (HOME / venv / needed).exists() else f"it is not installed in .pd/yardstick/{venv}"

    return problem


#: in the order of the tables; the first is ours
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("pdbench", _pdbench(), _read_pdbench, lambda: ""),
        Tool("pdbench-2", _pdbench("--processes", "2"), _read_pdbench, _no_such_option("--processes")),
        Tool("sglang-rust", _sglang("sglang_rust.py"), _read_line, _not_there("sglang", "bin/python")),
        Tool("sglang-python", _sglang("sglang_python.py"), _read_line, _not_there("sglang", "bin/python")),
        Tool("aiperf", _aiperf, _read_aiperf, _not_there("aiperf", "bin/aiperf")),
        Tool("floor-raw", _floor("raw"), _read_line, _not_there("sglang", "bin/python")),
        Tool("floor-parse", _floor("parse"), _read_line, _not_there("sglang", "bin/python")),
    )
}
