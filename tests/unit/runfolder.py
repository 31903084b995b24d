"""Synthetic run folders: a good run, made as a run makes it, that a test then spoils in one place before it is written."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from pdbench.metrics import Slo
from pdbench.records import MEASURE, WARMUP, Record, write_parquet
from pdbench.run.summary import Bounds, Setup, point_summary, whole_summary

Json = dict[str, Any]
KV_BYTES = 131072
CLIENT: Json = {
    "cpu_s": 0.4,
    "loop_lag_ms": {"p50": 0.1, "p99": 1.5, "max": 3.0},
    "send_lateness_ms": {"p50": 0.05, "p99": 0.4, "max": 0.9},
    "tokens_per_event": 1.0,
    "events_per_read": 1.0,
    "delivered_load": 0.99,
}


@dataclass
class Run:
    """The parts of a run's folder; change what a test is about, then `write`."""

    plan: Json
    records: list[Record]
    asked: list[Json]
    clients: list[Json]
    evidence: Json
    progress: Json
    manifest: Json
    prompt: str = "tokens"
    logs: dict[str, str] = field(default_factory=dict)
    lost: str = ""
    slo: Slo = field(default_factory=Slo)
    bounds: Bounds = field(default_factory=Bounds)
    verify_outputs: int = 0
    selfcheck: Json = field(default_factory=dict)

    def measured(self, point: int = 0) -> list[Record]:
        return [r for r in self.records if r.point == point and r.phase == MEASURE]

    def side(self, end: str, point: int = 0) -> Json:
        side: Json = self.evidence["points"][point][end]
        return side

    def metrics(self, worker: str, end: str = "after", point: int = 0) -> dict[str, float]:
        found: dict[str, float] = self.side(end, point)["workers"][worker]["metrics"]
        return found

    def write(self, folder: Path, leave_out: Sequence[str] = ()) -> Path:
        """Write every file but those of `leave_out`; summary.json is made of the records as they now are."""
        folder.mkdir(parents=True, exist_ok=True)
        setup = Setup(
            "completions",
            self.prompt,
            self.asked,
            self.plan["ratio"],
            gpus(self.plan),
            self.slo,
            self.bounds,
            self.verify_outputs,
        )
        points = [point_summary(setup, n, self.records, self.clients[n]) for n in range(len(self.asked))]
        files = {
            "plan.json": self.plan,
            "progress.json": self.progress,
            "run.json": {"schema": 1, **asdict(setup)},
            "summary.json": whole_summary(setup, points, []),
            "evidence.json": self.evidence,
            "manifest.json": self.manifest,
        }
        if self.selfcheck:
            files["selfcheck.json"] = self.selfcheck
        for name, content in files.items():
            if name not in leave_out and name != self.lost:
                (folder / name).write_text(json.dumps(content))
        for name, text in self.logs.items():
            (folder / "logs").mkdir(exist_ok=True)
            (folder / "logs" / name).write_text(text)
        if "requests.parquet" not in leave_out:
            write_parquet(folder / "requests.parquet", self.records)
        return folder


def gpus(plan: Json) -> int:
    return len({(rank["host"], gpu) for w in plan["workers"] for rank in w["ranks"] for gpu in rank["gpus"]})


def worker(name: str, role: str, host: str, gpu: Sequence[int], port: int) -> Json:
    rank = {"host": host, "node_rank": 0, "gpus": list(gpu), "unit": f"pd-{name}.service", "argv": [], "env": {}}
    rank["bootstrap_port"] = port + 1000
    return {"name": name, "role": role, "url": f"http://127.0.0.1:{port}", "ranks": [{**rank, "port": port}]}


def plan(ratio: str = "3p1d", emulated: bool = False) -> Json:
    """A plan on two hosts of four GPUs: `NpMd` or `Nagg`."""
    hosts = ("gh200", "a100")
    if ratio.endswith("agg"):
        roles = ["aggregated"] * int(ratio.removesuffix("agg") or 1)
    else:
        prefill, decode = ratio.removesuffix("d").split("p")
        roles = ["prefill"] * int(prefill) + ["decode"] * int(decode)
    workers = []
    for i, role in enumerate(roles):
        number = roles[:i].count(role)
        workers.append(worker(f"{role}-{number}", role, hosts[role == "decode"], [number], 30000 + i))
    pairs = [
        {"prefill": p["name"], "decode": d["name"], "expected_transport": "tcp"}
        for p in workers
        for d in workers
        if (p["role"], d["role"]) == ("prefill", "decode")
    ]
    return {
        "schema": 1,
        "ratio": ratio,
        "engine": "emulated" if emulated else "sglang",
        "engine_version": "0.5.23",
        "emulated": emulated,
        "model": "Qwen/Qwen2.5-3B-Instruct",
        "served_model_name": "qwen",
        "transfer_backend": "nixl" if pairs else "none",
        "transfer_backend_reason": "gh200 is infiniband and a100 is roce: no common RDMA path, so TCP",
        "pairs": pairs,
        "workers": workers,
        "router": {"name": "sglang-router", "version": "0.3.2", "host": "a100", "url": "http://127.0.0.1:8000", "argv": []},
        "hosts": {
            "gh200": {"address": "127.0.0.1", "gpus": [0, 1, 2, 3], "rdma_fabric": "infiniband", "rdma_devices": ["mlx5_0"]},
            "a100": {"address": "127.0.0.1", "gpus": [0, 1, 2, 3], "rdma_fabric": "roce", "rdma_devices": ["mlx5_1"]},
        },
    }


def requests(point: int, asked: Json, chunks: int, isl: int, rng: random.Random, phase: str = MEASURE) -> list[Record]:
    """Answers of one point: as many at a time as the concurrency, or sent at the rate; latencies grow with the load."""
    concurrency, rate = asked["concurrency"], asked["request_rate"]
    slots = [0.0] * (concurrency or 1)
    load = concurrency or rate * 0.6
    due, records = 0.0, []
    for index in range(asked["num_requests"]):
        if rate is None:
            due = heapq.heappop(slots)
        elif index:
            due += rng.expovariate(rate)
        sent = due + rng.uniform(0.00005, 0.0003)
        first = sent + (0.05 + 0.004 * load) * rng.lognormvariate(0, 0.35)
        gaps = [(0.008 + 0.0001 * load) * rng.lognormvariate(0, 0.15) for _ in range(chunks - 1)]
        times = list(accumulate(gaps, initial=first))
        if rate is None:
            heapq.heappush(slots, times[-1] + 0.0002)
        records.append(
            Record(
                point, index, phase, isl, chunks, due, sent, first, times[-1], times, [1] * chunks, isl, chunks, 0, 200,
                "length", True, "", f"{index:064x}",
            )
        )  # fmt: skip
    return records


def samples(role: str, served: Sequence[Record]) -> dict[str, float]:
    """What an SGLang server of that role shows after it served these requests; nothing that never moved is shown."""
    front = f'model_name="qwen",engine_type="{role}"'
    rank = f'{front},tp_rank="0"'
    n, n_in, n_out = len(served), sum(r.prompt_tokens for r in served), sum(r.output_tokens for r in served)
    found: dict[str, float] = {
        f'sglang:num_requests_total{{{front},is_streaming="true"}}': n,
        f'sglang:prompt_tokens_total{{{front},is_streaming="true"}}': n_in,
        f'sglang:generation_tokens_total{{{front},is_streaming="true"}}': n if role == "prefill" else n_out,
        f'sglang:e2e_request_latency_seconds_count{{{front},is_streaming="true"}}': n,
    }
    if role == "prefill":
        found |= {
            f"sglang:kv_transfer_total_mb_count{{{rank}}}": n,
            f"sglang:kv_transfer_total_mb_sum{{{rank}}}": n_in * KV_BYTES / 2**20,
            f"sglang:kv_transfer_latency_ms_count{{{rank}}}": n,
            f'sglang:realtime_tokens_total{{{rank},mode="prefill_compute"}}': n_in,
        }
    shown = {name: float(value) for name, value in found.items() if value}
    return {**shown, f"sglang:num_running_reqs{{{rank}}}": 0.0}


def side(deployed: Json, records: Sequence[Record], t_s: float) -> Json:
    """One side of a point's evidence, when these requests are behind the cluster: spread round robin in each role."""
    roles = {w["role"] for w in deployed["workers"]}
    listed, seen = [], {}
    for role in sorted(roles):
        same = [w for w in deployed["workers"] if w["role"] == role]
        for i, w in enumerate(same):
            listed.append(
                {
                    "url": w["url"],
                    "worker_type": "regular" if role == "aggregated" else role,
                    "is_healthy": True,
                    "connection_mode": "HTTP",
                }
            )
            seen[w["name"]] = {
                "url": w["url"],
                "server_info": {"version": "0.5.23", "startup_time": {"load_weight": 4.2}, "page_size": 1},
                "metrics": samples(role, records[i :: len(same)]),
                "error": "",
            }
    return {"t_s": t_s, "router": {"workers": listed, "readiness": {"status": "ready"}, "error": ""}, "workers": seen}


def reset(deployed: Json) -> Json:
    """What SGLang answers to the steps before a point."""
    return {w["name"]: {"full_speed": "ok", "profile": "unknown", "flush": "ok"} for w in deployed["workers"]}


def good(
    ratio: str = "3p1d",
    concurrency: Sequence[int] = (4, 8),
    rates: Sequence[float] = (),
    num_requests: int = 24,
    chunks: int = 6,
    isl: int = 64,
    emulated: bool = False,
    seed: int = 1,
) -> Run:
    """A run that deserves to be believed, one load point for each concurrency or rate."""
    rng = random.Random(seed)
    deployed = plan(ratio, emulated)
    asked = [
        {
            "concurrency": None if rates else load,
            "request_rate": load if rates else None,
            "arrival": "poisson" if rates else None,
            "time_scale": None,
            "isl": str(isl),
            "osl": str(chunks),
            "trace": None,
            "length_scale": None,
            "max_isl": None,
            "max_osl": None,
            "num_requests": num_requests,
            "seed": seed,
        }
        for load in (rates or concurrency)
    ]
    records: list[Record] = []
    ends = []
    for number, entry in enumerate(asked):
        # The evidence before a point is taken before its warm-up.
        before = side(deployed, records, 0.0)
        for phase, count in ((WARMUP, 4), (MEASURE, num_requests)):
            records += requests(number, {**entry, "num_requests": count}, chunks, isl, rng, phase)
        ends.append({"point": number, "reset": reset(deployed), "before": before, "after": side(deployed, records, 9.0)})
    return Run(
        plan=deployed,
        records=records,
        asked=asked,
        clients=[json.loads(json.dumps(CLIENT)) for _ in asked],
        evidence={"schema": 1, "points": ends},
        progress={
            "state": "done",
            "point": len(asked),
            "points": len(asked),
            "done": num_requests,
            "total": num_requests,
            "failed": 0,
            "elapsed_s": 12.5,
            "eta_s": 0.0,
            "message": "",
        },
        manifest={"ratio": ratio, "bench_max_error_rate": 0.0, "bench_num_requests": num_requests},
    )
