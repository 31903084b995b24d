"""What the page says in words: deployment, load, verdict, definitions."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from pdbench import attribution, intervals, metrics, shapes, steady
from pdbench.gate.cli import VALIDITY
from pdbench.gate.counters import info, moved
from pdbench.gate.rundata import NotARun, Point, RunData
from pdbench.reading import json_of

Json = dict[str, Any]
_TRANSPORTS = {"tcp": "TCP", "rdma": "RDMA", "cuda_ipc": "CUDA IPC on one host"}
#: optional files of a run -> what the page lacks without them
_OPTIONAL = {
    "server_metrics.parquet": "what engines and router said of themselves during the run",
    "gpu_metrics.parquet": "use, power and clocks of the GPUs",
    "manifest.json": "how to run it again",
    "logs": "the logs of engines and router",
}
_MARKED = re.compile(r"``(.+?)``|`(.+?)`|(?<!\w)\*(\w[^*]*)\*")


@dataclass(frozen=True)
class Verdict:
    """Whether to trust the run: ``valid`` is None when nobody judged it; ``reasons`` say why not, one sentence each."""

    valid: bool | None
    reasons: list[str]
    checks: list[Json]

    @property
    def stamp(self) -> str:
        """Return what is written across the plots."""
        return {True: "", False: "INVALID RUN", None: "NOT CHECKED"}[self.valid]


def verdict(run: RunData) -> Verdict:
    """Read validity.json; without a usable one the run counts as not judged."""
    try:
        found = json_of((run.folder / VALIDITY).read_text(encoding="utf-8"))
        if newer := shapes.newer(found):
            raise NotARun(f"{run.folder / VALIDITY}: {newer}")
        checks = [dict(check) for check in found["checks"]]
        bad = [check for check in checks if not check["ok"]]
        labels = {point.index: point.label for point in run.points}
        reasons = [
            (f"{labels.get(check['point'], 'point ' + str(check['point']))}: " if check["point"] is not None else "")
            + str(check["message"])
            for check in bad
        ]
        return Verdict(found["valid"] is True and not bad, reasons, checks)
    except FileNotFoundError:
        return Verdict(None, [f"{VALIDITY} is missing: nobody has checked this run; `pdbench gate` does"], [])
    except (OSError, ValueError, KeyError, TypeError) as why:
        return Verdict(None, [f"{VALIDITY} cannot be read ({type(why).__name__}): run `pdbench gate` again"], [])


def deployment(run: RunData) -> list[str]:
    """Say in sentences what was deployed; one sentence that it is not known without a plan."""
    plan = run.plan
    if not plan:
        return [f"What was deployed is not known: plan.json is {run.problems.get('plan.json', 'empty')}."]
    counts = Counter(worker["role"] for worker in run.workers)
    workers = " and ".join(_many(count, f"{role} worker") for role, count in counts.items())
    hosts = list(dict.fromkeys(str(rank["host"]) for worker in run.workers for rank in worker["ranks"]))
    engine = " ".join(str(plan[key]) for key in ("engine", "engine_version") if plan.get(key))
    engine = f"an emulated engine ({engine})" if run.emulated else engine
    sentences = [
        f"{plan.get('ratio')}: {workers} of {engine}, serving {plan.get('model')}"
        f"{_served(plan)}, on {_many(gpus(plan), 'GPU')} of {_many(len(hosts), 'host')} ({', '.join(hosts)})."
    ]
    if run.truncated:
        sentences.append(f"The model is not whole: {run.truncated}. Nothing here holds for {plan.get('model')} itself.")
    router = plan.get("router") or {}
    if router:
        name = " ".join(str(router[key]) for key in ("name", "version") if router.get(key)) or "A router"
        sentences.append(f"{name} on {router.get('host')} spread the requests.")
    if run.disaggregated:
        kinds = Counter(str(pair.get("expected_transport")) for pair in plan.get("pairs") or [])
        over = " and ".join(
            f"{_TRANSPORTS.get(kind, kind)} for {_many(count, 'prefill-decode pair')}" for kind, count in kinds.items()
        )
        sentences.append(
            f"The KV cache moves with {plan.get('transfer_backend')}, expected over {over or 'an unknown transport'}: "
            f"{plan.get('transfer_backend_reason')}."
        )
    return sentences + emulation(run)


def seen(found: Verdict) -> list[str]:
    """Say over what the KV cache was seen to move, as far as it was seen."""
    checks = [check for check in found.checks if check.get("id") == "transport" and isinstance(check.get("evidence"), dict)]
    pairs = [pair for check in checks for pair in (check["evidence"].get("pairs") or {}).values()]
    ways = Counter(way for pair in pairs for way in {way for ways in pair["seen"].values() for way in ways})
    if not ways:
        return []
    named = " and ".join(f"{_TRANSPORTS.get(way, way)} for {count} of {_many(len(pairs), 'pair')}" for way, count in ways.items())
    return [f"It was seen to move over {named}."]


_LATE = "pdbench_emulator_token_lateness_seconds"


def emulation(run: RunData) -> list[str]:
    """Say which performance model stood for the GPUs, and how late its tokens were."""
    if not run.emulated:
        return []
    points = [(point.evidence, str(worker["name"])) for point in run.points for worker in run.workers]
    profiles = sorted({str(text) for evidence, name in points if (text := info(evidence, "after", name).get("emulated_profile"))})
    sentences = [f"Times came from the performance model of {' and '.join(profiles)}."] if profiles else []
    late, tokens = (
        sum(moved(evidence, name, [_LATE + end]).amount or 0.0 for evidence, name in points) for end in ("_sum", "_count")
    )
    if tokens:
        sentences.append(
            f"The emulator was {1000 * late / tokens:.1f} ms late with a token on average: it is in every latency below."
        )
    return sentences


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _served(plan: Json) -> str:
    name = plan.get("served_model_name")
    return f" as {name}" if name and name != plan.get("model") else ""


def gpus(plan: Json) -> int:
    """Return how many GPUs the workers hold; one that two workers share counts once."""
    return len({(rank["host"], gpu) for worker in plan["workers"] for rank in worker["ranks"] for gpu in rank["gpus"]})


def workload(run: RunData) -> list[str]:
    """Say in sentences what was sent."""
    if not run.points:
        return ["Nothing was measured."]
    first = run.points[0].summary
    total = sum(len(point.records) for point in run.points)
    failed = total - sum(len(point.good) for point in run.points)
    loads = ", ".join(point.label for point in run.points)
    sentences = [
        f"{_many(len(run.points), 'load point')}: {loads}; {_many(total, 'request')} in all, {failed or 'none'} of them failed."
    ]
    if first.get("trace"):
        sentences.append(f"Prompt and output lengths come from the trace {first['trace']}.")
    elif first.get("isl"):
        sentences.append(f"Prompts of {first['isl']} tokens and forced outputs of {first.get('osl')} tokens.")
    if first.get("request_rate") is not None:
        sentences.append(f"Requests were sent on a {first.get('arrival')} schedule, whatever the server did (open loop).")
    elif first.get("concurrency") is not None:
        sentences.append("A new request was sent when another one had ended (closed loop).")
    if run.summary.get("api"):
        sentences.append(f"API: {run.summary['api']}, streamed; seed {first.get('seed')}.")
    return sentences


def notes(points: Sequence[Point], found: Verdict) -> list[str]:
    """Return what a reader must know of figures that are valid: the client's notes, and cautions of the checks."""
    labels: dict[object, str] = {point.index: point.label for point in points}
    noted = [f"{point.label}: {note}" for point in points for note in point.summary.get("notes") or []]
    for point in points:
        window = point.summary.get("steady")
        if isinstance(window, dict) and not window.get("found"):
            noted.append(f"{point.label}: no steady window, {window.get('reason')}")
    return noted + [
        f"{labels.get(check.get('point'), 'run')}: {check['evidence']['caution']}"
        for check in found.checks
        if isinstance(check.get("evidence"), dict) and check["evidence"].get("caution")
    ]


def missing(run: RunData) -> list[str]:
    """Say which files of the run are not there, and what the page lacks without them."""
    rows = [f"{name}: {why}" for name, why in run.problems.items()]
    return rows + [f"{name} was not recorded ({what})" for name, what in _OPTIONAL.items() if not (run.folder / name).exists()]


def definitions() -> list[tuple[str, Markup]]:
    """Return (name, definition): the docstrings of pdbench.metrics, where the figures are computed."""
    figures: tuple[tuple[str, Callable[..., object]], ...] = (
        ("TTFT", metrics.ttft_s),
        ("ITL", metrics.itl_s),
        ("ITL by token", metrics.token_itl_s),
        ("TPOT", metrics.tpot_s),
        ("E2E", metrics.e2e_s),
        ("E2E per token", metrics.normalised_s),
        ("Tokens/s per user", metrics.user_rate),
        ("Tokens/s per user, incl. TTFT", metrics.request_rate),
        ("Output tokens", metrics.output_tokens),
        ("Duration", metrics.duration_s),
        ("Throughput", metrics.summarise),
        ("Goodput", metrics.goodput),
    )
    rows = [(name, _prose(inspect.getdoc(function) or "")) for name, function in figures]
    last = (inspect.getdoc(metrics) or "").split("\n\n")[-1]
    window = (inspect.getdoc(steady) or "").split("\n\n")[1].removeprefix("**Window.** ")
    return [
        *rows,
        ("From schedule", _prose("from when the load model wanted the request sent, not from when it was sent")),
        ("Percentiles", _prose(last)),
        ("Steady window", _prose(window)),
        ("Mean TTFT by stage", _prose((inspect.getdoc(attribution) or "").split("\n\n", 1)[-1])),
        ("95 % intervals", _prose(intervals.IN_SHORT)),
    ]


def _prose(text: str) -> Markup:
    """Turn a docstring into HTML: paragraphs, ``code`` as code, *stress* as stress; "Return the" is for programmers."""
    paragraphs = [" ".join(part.split()) for part in text.removeprefix("Return the ").split("\n\n")]
    paragraphs[0] = paragraphs[0][:1].upper() + paragraphs[0][1:]
    html = [_MARKED.sub(_mark, str(escape(part))) for part in paragraphs]
    return Markup("".join(f"<p>{part}</p>" for part in html))


def _mark(match: re.Match[str]) -> str:
    return f"<em>{match[3]}</em>" if match[3] else f"<code>{match[1] or match[2]}</code>"
