"""A run's folder, read once: what the gate judges and the report shows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdbench import shapes
from pdbench.engines import Engine, engine, no_gpu
from pdbench.reading import json_of
from pdbench.records import MEASURE, Record, read_parquet
from pdbench.run.summary import Bounds

Json = dict[str, Any]

ROLES = ("prefill", "decode", "aggregated")
SELFCHECK = "selfcheck.json"
CLIENTS = "clients.json"
#: files that a run to be believed has; the first two are what makes a folder a run's folder
PROGRESS, REQUESTS, SUMMARY, PLAN, EVIDENCE = (
    "progress.json",
    "requests.parquet",
    "summary.json",
    "plan.json",
    "evidence.json",
)


class NotARun(Exception):
    """The folder is not there, or holds no run; the message is for the user."""


@dataclass(frozen=True)
class Point:
    """One load point.

    ``index`` counts from 0; ``summary`` is its entry in summary.json and ``evidence`` its entry in evidence.json (empty when
    absent); ``records`` are its measured requests, ``warmup`` the ones before them.
    """

    index: int
    summary: Json
    evidence: Json
    records: list[Record]
    warmup: list[Record] = field(default_factory=list)

    def reset_of(self, worker: str) -> Json:
        """Return what came of bringing a worker to its starting state before the point (`Evidence.reset`)."""
        steps: Json = self.evidence.get("reset", {}).get(worker, {})
        return steps

    @property
    def answers(self) -> list[Record]:
        """Return every successful request between the two ends of the evidence: warm-up and measured."""
        return [r for r in (*self.warmup, *self.records) if r.ok]

    @property
    def asked(self) -> int | None:
        """Requests that the point was to send, warm-up not among them; None when the run did not say."""
        value = self.summary.get("num_requests")
        return value if isinstance(value, int) else None

    @property
    def good(self) -> list[Record]:
        """Return the requests that the client calls successful."""
        return [r for r in self.records if r.ok]

    @property
    def client(self) -> Json:
        """Return what the client recorded of itself."""
        found = self.summary.get("client")
        return found if isinstance(found, dict) else {}

    @property
    def label(self) -> str:
        """Name the load: ``concurrency 32``, ``4 req/s``, ``trace x0.5``, or the point's number."""
        if isinstance(self.summary.get("concurrency"), int):
            return f"concurrency {self.summary['concurrency']}"
        if isinstance(self.summary.get("request_rate"), (int, float)):
            to = self.summary.get("request_rate_to")
            return f"{self.summary['request_rate']:g}{f'-{to:g}' if isinstance(to, (int, float)) else ''} req/s"
        if isinstance(self.summary.get("time_scale"), (int, float)):
            return f"trace x{self.summary['time_scale']:g}"
        return f"point {self.index}"


@dataclass(frozen=True)
class RunData:
    """Everything in a run's folder that the gate looks at.

    ``problems``: file name -> why it could not be used ("missing", or what is wrong with it); the attribute of such a file
    is empty. ``max_error_rate``: the share of failed requests that is allowed, 0 to 1. ``bounds``: how late the client was
    allowed to be when the run was started. ``logs``: the ends of the units' logs, by file name. ``verify_outputs``: prompts
    a pair that the run was to verify, ``verified`` what came of it (`pdbench.run.verify`). ``selfcheck``: what
    `pdbench selfcheck` found before the load, empty when it was not run. ``clients``: who made the run together
    (`pdbench merge`), empty when it was one client.
    """

    folder: Path
    plan: Json = field(default_factory=dict)
    progress: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    manifest: Json = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    problems: Mapping[str, str] = field(default_factory=dict)
    max_error_rate: float = 0.0
    bounds: Bounds = field(default_factory=Bounds)
    logs: Mapping[str, str] = field(default_factory=dict)
    verify_outputs: int = 0
    verified: Json = field(default_factory=dict)
    selfcheck: Json = field(default_factory=dict)
    clients: Json = field(default_factory=dict)

    @property
    def emulated(self) -> bool:
        """Tell whether the engine was emulated: no GPU took part."""
        return self.plan.get("emulated") is True

    @property
    def no_gpu(self) -> str:
        """Say why no GPU took part, "" where GPUs did; what the plan calls a GPU is a slot then."""
        return no_gpu(self.emulated, self.plan.get("on_cpu") is True)

    @property
    def truncated(self) -> str:
        """Say what made the model another one than its name says, "" where it was whole."""
        return str(self.plan.get("truncated") or "")

    @property
    def engine(self) -> Engine:
        """Return what is known of the engine that the plan names."""
        return engine(self.plan.get("engine"))

    def log_of(self, worker: Json) -> str:
        """Return what was fetched of the logs of a worker's ranks, "" when there is none."""
        names = {f"{rank.get('host')}-{str(rank.get('unit')).removesuffix('.service')}.log" for rank in worker["ranks"]}
        return "\n".join(self.logs.get(name, "") for name in sorted(names))

    @property
    def workers(self) -> list[Json]:
        """Return the plan's workers."""
        return list(self.plan.get("workers", []))

    @property
    def disaggregated(self) -> bool:
        """Tell whether prefill and decode are separate workers in the plan."""
        return any(worker["role"] == "prefill" for worker in self.workers)


def load(folder: Path, max_error_rate: float | None = None) -> RunData:
    """Read a run's folder.

    ``max_error_rate`` wins over ``bench_max_error_rate`` of manifest.json, which wins over 0. Raises NotARun when the
    folder is missing, has neither progress.json nor requests.parquet, or was written by a later pdbench.
    """
    if not folder.is_dir():
        raise NotARun(f"{folder} is not a folder; give the folder of a run, such as results/latest")
    if not any((folder / name).is_file() for name in (PROGRESS, REQUESTS)):
        raise NotARun(f"{folder} is not the folder of a run: it has neither {PROGRESS} nor {REQUESTS}")
    problems: dict[str, str] = {}
    progress = _json(folder, PROGRESS, problems, shapes.PROGRESS)
    summary = _json(folder, SUMMARY, problems, shapes.SUMMARY)
    plan = _json(folder, PLAN, problems, shapes.PLAN)
    evidence = _json(folder, EVIDENCE, problems, shapes.EVIDENCE)
    _check_plan(plan, problems)
    _check_evidence(evidence, problems)
    manifest = _json(folder, "manifest.json", {})
    absent: dict[str, str] = {}
    selfcheck = _json(folder, SELFCHECK, absent)
    if absent.get(SELFCHECK, "missing") != "missing":
        selfcheck = {"error": f"{SELFCHECK} is {absent[SELFCHECK]}"}
    records: list[Record] = []
    try:
        records = read_parquet(folder / REQUESTS)
    except FileNotFoundError:
        problems[REQUESTS] = "missing"
    except (OSError, ValueError) as why:  # pyarrow's errors are ValueErrors
        problems[REQUESTS] = f"unreadable: {_first_line(why)}"
    allowed = manifest.get("bench_max_error_rate") if max_error_rate is None else max_error_rate
    setup = _json(folder, "run.json", {})
    asked = setup.get("verify_outputs")
    return RunData(
        folder=folder,
        plan=plan,
        progress=progress,
        summary=summary,
        manifest=manifest,
        points=_points(summary, evidence, records),
        problems=problems,
        max_error_rate=float(allowed) if isinstance(allowed, (int, float)) else 0.0,
        bounds=_bounds(setup),
        logs=_logs(folder / "logs"),
        verify_outputs=asked if isinstance(asked, int) else 0,
        verified=evidence.get("verify", {}),
        selfcheck=selfcheck,
        clients=_json(folder, CLIENTS, {}),
    )


def _logs(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.log")):
        with contextlib.suppress(OSError):
            found[path.name] = path.read_text(encoding="utf-8", errors="replace")
    return found


def _json(folder: Path, name: str, problems: dict[str, str], shape: Json | None = None) -> Json:
    try:
        value = json_of((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems[name] = "missing"
    except (OSError, ValueError) as why:
        problems[name] = f"unreadable: {_first_line(why)}"
    else:
        if later := shapes.newer(value):
            raise NotARun(f"{folder / name}: {later}")
        fault = "not a JSON object" if not isinstance(value, dict) else shapes.wrong(value, shape or {})
        if not fault:
            return dict(value)
        problems[name] = f"unreadable: {fault}"
    return {}


def _check_plan(plan: Json, problems: dict[str, str]) -> None:
    if PLAN in problems:
        return
    try:
        bad = [w["name"] for w in plan["workers"] if w["role"] not in ROLES or not w["url"] or not w["ranks"]]
        problem = f"worker {bad[0]} lacks a known role, a url or ranks" if bad else ""
        names = {w["name"] for w in plan["workers"]}
        if not all(pair[end] in names for pair in plan.get("pairs") or [] for end in ("prefill", "decode")):
            problem = "pairs names a worker that is not there"
    except (KeyError, TypeError) as why:
        problem = f"no plan as plan.yml writes it: {type(why).__name__} {why}"
    if problem:
        problems[PLAN] = f"unreadable: {problem}"
        plan.clear()


def _check_evidence(evidence: Json, problems: dict[str, str]) -> None:
    if EVIDENCE in problems:
        return
    try:
        sides = [point[end] for point in evidence["points"] for end in ("before", "after") if point.get(end) is not None]
        good = all(
            isinstance(side["router"], dict) and all(isinstance(w.get("metrics"), dict) for w in side["workers"].values())
            for side in sides
        ) and all(isinstance(steps, dict) for point in evidence["points"] for steps in point.get("reset", {}).values())
        good = good and _good_verify(evidence.get("verify", {"prompts": 0, "pairs": []}))
        problem = "" if good else "the router or a worker is no JSON object with what belongs there"
    except (KeyError, TypeError, AttributeError) as why:
        problem = f"not as `pdbench run` writes it: {type(why).__name__} {why}"
    if problem:
        problems[EVIDENCE] = f"unreadable: {problem}"
        evidence.clear()


def _good_verify(verify: Json) -> bool:
    figures = ("prompts", "tokens", "wrong_prompts", "wrong_tokens", "worst_nats")
    rows = [[row[name] for name in figures] for row in verify["pairs"]]
    return all(isinstance(value, (int, float)) for row in [[verify["prompts"]], *rows] for value in row)


def _bounds(setup: Json) -> Bounds:
    try:
        return Bounds(**{name: float(value) for name, value in setup.get("bounds", {}).items()})
    except (TypeError, ValueError, AttributeError):
        return Bounds()


def _first_line(why: Exception) -> str:
    return (str(why).splitlines() or [type(why).__name__])[0]


def summary_points(summary: Json) -> list[Json]:
    """Return the entries of summary.json, one a load point; the summary itself where it has no ``points``."""
    if not summary:
        return []
    listed = summary.get("points")
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else [summary]


def _points(summary: Json, evidence: Json, records: list[Record]) -> list[Point]:
    figures = {entry.get("point", i): entry for i, entry in enumerate(summary_points(summary))}
    seen = {entry.get("point", i): entry for i, entry in enumerate(evidence.get("points", []))}
    measured: dict[int, list[Record]] = {}
    warmup: dict[int, list[Record]] = {}
    for record in records:
        (measured if record.phase == MEASURE else warmup).setdefault(record.point, []).append(record)
    return [
        Point(index, figures.get(index, {}), seen.get(index, {}), measured.get(index, []), warmup.get(index, []))
        for index in sorted({*figures, *seen, *measured})
    ]
