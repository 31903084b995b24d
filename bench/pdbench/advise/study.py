"""Does it pay to change the ratio while serving? Fixed ratios, a simple controller and an oracle under changing loads.

    python -m pdbench.advise.study --trace conversation_trace.jsonl --output DIR

Writes DIR/study.json and DIR/study.png and prints the tables of docs/results/dynamic-ratio.md. Everything is simulated.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np

from pdbench.advise.elastic import Elastic, Fixed, Policy, Queueing, Schedule
from pdbench.advise.layout import alike, build
from pdbench.advise.pool import pool
from pdbench.advise.rank import Spread
from pdbench.advise.say import grounds
from pdbench.advise.study_words import picture, words
from pdbench.advise.workloads import Day, Trace, windows
from pdbench.load.errors import LoadError
from pdbench.load.trace import Scaling, read_trace
from pdbench.metrics import Slo
from pdbench.model import profile
from pdbench.model.cluster import Outcome, Prompt, Simulation
from pdbench.model.profile import Profile, ProfileError
from pdbench.model.rates import Rates
from pdbench.records import write_json
from pdbench.run.load_options import Parser, above_zero, at_least, numbers
from pdlib.autoscale import Rule

#: what a drain takes on top of the restart, as the oracle reckons, in s
DRAIN_S = 10.0
#: what another worker must bring to be worth a change, as a share of the requests
WORTH = 0.005
AGGREGATED, CONTROLLER, ORACLE = "aggregated", "controller", "oracle"


@dataclass(frozen=True, eq=False)
class Question:
    """What all runs share: ``workers`` of ``gpus`` GPUs each, limits in ms. Equal to itself alone: a key for what is kept."""

    profile: Profile
    workers: int
    gpus: int
    slo: Slo
    sources: tuple[Trace | Day, ...]

    @property
    def rates(self) -> Rates:
        """Return a worker's rates."""
        return Rates(self.profile, self.gpus)

    @property
    def itl_s(self) -> float:
        """Return the promised gap between tokens in s."""
        return (self.slo.tpot_ms or 0.0) / 1e3


@dataclass(frozen=True)
class Run:
    """One simulated run. ``met``: the share of requests within both limits; ``changes`` and the seconds that one took."""

    source: str
    load: float
    seed: int
    policy: str
    met: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p99_ms: float
    changes: int = 0
    change_s: float = 0.0


#: (place of the source, load, seed, policy): a ratio such as 5p3d, or one of the three names
Task = tuple[int, float, int, str]


@lru_cache(maxsize=2)
def _prompts(question: Question, source: int, load: float, seed: int) -> tuple[Prompt, ...]:
    made = question.sources[source].prompts(question.rates, question.workers, load, question.itl_s, seed)
    return tuple(made)


def good(outcomes: Sequence[Outcome], slo: Slo) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return of every request whether it met both limits; one that was refused did not."""
    found = np.zeros(len(outcomes), dtype=bool)
    for place, one in enumerate(outcomes):
        if one.tokens:
            more = one.prompt.output_tokens - 1
            tpot = (one.end - one.tokens[0]) / more if more else 0.0
            in_time = slo.ttft_ms is None or one.ttft * 1e3 <= slo.ttft_ms
            found[place] = in_time and (slo.tpot_ms is None or tpot * 1e3 <= slo.tpot_ms)
    return found


def split(policy: str) -> int:
    """Return the prefill workers of a fixed ratio."""
    return int(policy.split("p")[0])


def run(question: Question, task: Task) -> Run:
    """Simulate one policy under one load and seed."""
    source, load, seed, name = task
    prompts = _prompts(question, source, load, seed)
    changes: list[tuple[float, int, int, float]] = []
    if name == AGGREGATED:
        layout = alike(0, 0, question.workers, question.profile.name, question.gpus)
        outcomes = Simulation(build(layout, {question.profile.name: question.profile}), every_token=False).open_loop(prompts)
    else:
        prefill = question.workers // 2
        policy: Policy = Fixed()
        if name == CONTROLLER:
            assert question.slo.ttft_ms
            policy = Queueing(Rule(question.slo.ttft_ms / 1e3, question.itl_s))
        elif name == ORACLE:
            plan = foresight(question, source, load, seed)
            policy, prefill = Schedule(plan, question.profile.engine.startup_s + DRAIN_S), plan[0][1]
        else:
            prefill = split(name)
        made = Elastic(question.profile, prefill, question.workers - prefill, policy, gpus=question.gpus)
        outcomes = made.open_loop(prompts)
        changes = made.changes
    served = [one for one in outcomes if one.tokens]
    ttft = np.array([one.ttft for one in served]) * 1e3
    tpot = [(one.end - one.tokens[0]) / (one.prompt.output_tokens - 1) * 1e3 for one in served if one.prompt.output_tokens > 1]
    return Run(
        question.sources[source].name, load, seed, name, float(good(outcomes, question.slo).mean()),
        float(np.percentile(ttft, 50)), float(np.percentile(ttft, 99)), float(np.percentile(tpot, 99)),
        len(changes), statistics.fmean(took for *_, took in changes) if changes else 0.0,
    )  # fmt: skip


def foresight(question: Question, source: int, load: float, seed: int) -> list[tuple[float, int]]:
    """Return a ratio for every window that knows its requests: (its begin in s, prefill workers).

    Each ratio serves the window on an idle cluster. From the ratio of the window before it climbs, a worker at a time, as long
    as that brings half a percent of the requests or more: a change for nothing is no foresight.
    """
    length = question.sources[source].window_s
    plan: list[tuple[float, int]] = []
    for number, members in enumerate(windows(_prompts(question, source, load, seed), length)):
        if not members:
            continue
        begin = number * length
        moved = [Prompt(one.prompt_tokens, one.output_tokens, one.due - begin) for one in members]

        @lru_cache
        def share(prefill: int, moved: Sequence[Prompt] = tuple(moved)) -> float:
            if not 0 < prefill < question.workers:
                return -1.0
            made = Elastic(question.profile, prefill, question.workers - prefill, Fixed(), gpus=question.gpus)
            return float(good(made.open_loop(moved), question.slo).mean())

        prefill = plan[-1][1] if plan else question.workers // 2
        while share(prefill) < 1 - WORTH:
            best = max(prefill - 1, prefill + 1, key=share)
            if share(best) < share(prefill) + WORTH:
                break
            prefill = best
        plan.append((begin, prefill))
    return plan


def policies(question: Question) -> list[str]:
    """Return all that are compared: the oracle, which takes longest, first."""
    fixed = [f"{prefill}p{question.workers - prefill}d" for prefill in range(1, question.workers)]
    return [ORACLE, CONTROLLER, AGGREGATED, *fixed]


def runs(question: Question, loads: Sequence[float], seeds: int, spread: Spread) -> list[Run]:
    """Simulate all of it."""
    tasks = [
        (source, load, seed, policy)
        for source, load, seed in product(range(len(question.sources)), loads, range(seeds))
        for policy in policies(question)
    ]
    return list(spread(run, tasks))


def _parser() -> Parser:
    p = Parser(prog="python -m pdbench.advise.study", description=__doc__.splitlines()[0] if __doc__ else "", allow_abbrev=False)
    p.add_argument("--profile", default="h200-gpt-oss-120b", metavar="P", help="default: %(default)s")
    p.add_argument("--workers", type=int, default=8, metavar="N", help="default: %(default)s")
    p.add_argument("--gpus", type=int, default=1, metavar="N", help="of a worker (default: %(default)s)")
    p.add_argument("--trace", type=Path, metavar="FILE", help="a Mooncake trace; without it, the day only")
    p.add_argument(
        "--day", type=float, default=120.0, metavar="S", help="seconds of an hour of the day; 0: no day (default: 120)"
    )
    p.add_argument("--loads", default="0.6,0.75,0.9", metavar="L[,L]", help="share of the workers' time (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    p.add_argument("--slo-ttft-ms", type=float, default=2000.0, metavar="MS", help="default: %(default)s")
    p.add_argument("--slo-tpot-ms", type=float, default=40.0, metavar="MS", help="default: %(default)s")
    p.add_argument("--processes", type=int, metavar="N", help="default: as many as there are cores")
    p.add_argument("--output", type=Path, required=True, metavar="DIR")
    return p


def main(argv: list[str]) -> int:
    """Run the study; return the exit code."""
    try:
        args = _parser().parse_args(argv)
        at_least(args, 2, "workers", "seeds")
        at_least(args, 1, "gpus", "processes")
        at_least(args, 0, "day")
        above_zero(args, "slo_ttft_ms", "slo_tpot_ms")
        figures = profile.load(args.profile)
        sources: list[Trace | Day] = [Day(args.day)] if args.day else []
        if args.trace:
            sources.append(Trace(tuple(read_trace(args.trace, Scaling(max_isl=figures.model.context_length)))))
        if not sources:
            raise LoadError("nothing to study: give --trace or a --day above 0")
        question = Question(figures, args.workers, args.gpus, Slo(args.slo_ttft_ms, args.slo_tpot_ms), tuple(sources))
        loads = numbers("loads", args.loads)
        question.rates.capacity_tokens()
        args.output.mkdir(parents=True, exist_ok=True)
    except (LoadError, ProfileError) as why:
        print(f"study: {why}", file=sys.stderr)
        return 2
    except OSError as why:
        print(f"study: cannot write in {args.output}: {why.strerror or why}", file=sys.stderr)
        return 1
    with pool(question, args.processes) as spread:
        found = runs(question, loads, args.seeds, spread)
    said = {name: str(value) for name, value in vars(args).items() if name not in ("output", "trace", "processes")}
    write_json(args.output / "study.json", {"schema": 1, "options": said, "runs": [asdict(one) for one in found]})
    (args.output / "study.png").write_bytes(picture(found))
    print(f"{grounds(figures)}\n\n{words(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
