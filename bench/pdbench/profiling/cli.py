"""`pdbench profile`: `pdbench run` at one load point, beside which the workers of one role are profiled."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import asdict

from pdbench.load.errors import LoadError
from pdbench.load.requests import Load
from pdbench.profiling.steer import Steering, Wish
from pdbench.profiling.targets import Target, read
from pdbench.records import write_json
from pdbench.run import cli as run
from pdbench.run import load_options
from pdbench.run.folder import Folder
from pdbench.run.load_options import above_zero, at_least, with_load_file
from pdbench.run.order import Plan
from pdbench.run.session import CannotMeasureError, Session

ACTIVITIES = ("CPU", "GPU", "CUDA_PROFILER", "MEM", "RPD")
_TRACED, _NOT_TRACED = 0, 3


def main(argv: list[str]) -> int:
    """Run the verb; 0: every worker began to record, 3: one did not, 2: bad usage, 1: the load could not be sent."""
    try:
        args = with_load_file(_parser(), argv)
        workers, wish, plan, folder = _checked(args)
        folder.check()
        run.make_ready(plan)
    except LoadError as why:
        return _say(why, 2)
    except OSError as why:
        return _say(f"cannot write in {args.output}: {why.strerror or why}", 1)
    steering = Steering(workers, wish, plan.headers, plan.admin, args.admin_api_key_file or args.api_key_file)
    try:
        asyncio.run(_run(Session(plan, folder, steering)))
    except CannotMeasureError as why:
        return _say(why, 1)
    except OSError as why:
        return _say(f"cannot write in {args.output}: {why.strerror or why}", 1)
    outcome = steering.outcome
    write_json(args.output / "profile.json", {"schema": 1, "wish": asdict(wish), **asdict(outcome)})
    for problem in outcome.problems:
        _say(problem, 3)
    missing = [worker.name for worker in workers if worker.name not in outcome.started]
    return _NOT_TRACED if missing or outcome.problems else _TRACED


async def _run(session: Session) -> int:
    return await session.run()


def _checked(args: argparse.Namespace) -> tuple[tuple[Target, ...], Wish, Plan, Folder]:
    """Check every option; raise LoadError at the first that is wrong."""
    if not args.plan:
        raise LoadError("--plan plan.json is missing: it says which workers there are")
    if not args.role:
        raise LoadError("--role is missing: prefill or decode")
    at_least(args, 0, "slow_down")
    above_zero(args, "steps", "batch_timeout", "decode_batch")
    activities = tuple(args.activities.split(","))
    if unknown := [name for name in activities if name not in ACTIVITIES]:
        raise LoadError(f"--activities {unknown[0]!r}: write some of {','.join(ACTIVITIES)}")
    workers = read(args.plan, args.role, args.id)
    plan, folder = run.planned(args)
    if len(plan.loads) != 1:
        raise LoadError(
            f"a profile is taken at one load point, and this load has {len(plan.loads)}: give one --concurrency, --batch or rate"
        )
    load = plan.loads[0]
    longest = [request.osl for request in load.measured()]
    if args.role == "decode" and max(longest) <= args.steps:
        raise LoadError(
            f"no output is longer than {max(longest)} tokens, so decode never has {args.steps} steps of one batch: "
            f"take an --osl of {2 * args.steps} or more, or fewer --steps"
        )
    wish = Wish(
        role=args.role,
        id=args.id,
        steps=args.steps,
        slow_down_s=args.slow_down,
        batch=args.decode_batch,
        within_s=args.batch_timeout,
        activities=activities,
        record_shapes=not args.no_shapes,
        request_tokens=max(request.isl + request.osl for request in load.measured()),
        sent=_in_flight(load),
    )
    return workers, wish, plan, folder


def _in_flight(load: Load) -> int:
    return min(load.concurrency or load.count, load.count)


def _parser() -> argparse.ArgumentParser:
    p = run.parser(profiled=True)
    p.prog = "pdbench profile"
    p.description = "Send a load and record some forward steps of one role with the engine's own profiler."
    p.epilog = f"""{load_options.HELP}

exit codes: 0 every worker recorded, 3 one did not (profile.json says why), 2 bad usage, 1 the load could not be sent.
Whatever ends this command, workers that it slowed down are released: a process of its own sees to that."""
    what = p.add_argument_group("profile")
    what.add_argument("--role", choices=("prefill", "decode"), help="whose steps are recorded")
    what.add_argument("--id", default="profile", help="what the traces are called (default: %(default)s)")
    what.add_argument("--steps", type=int, default=10, metavar="N", help="forward steps to record (default: 10)")
    what.add_argument(
        "--slow-down",
        type=float,
        default=5.0,
        metavar="S",
        help="role decode: sleep before every step while the batch is gathered (default: 5; 0: do not)",
    )
    what.add_argument(
        "--decode-batch", type=int, metavar="N", help="requests that every decode worker gathers (default: all that fit)"
    )
    what.add_argument("--batch-timeout", type=float, default=600.0, metavar="S", help="for gathering them (default: 600)")
    what.add_argument(
        "--activities", default="CPU,GPU", metavar="A,B", help=f"what is recorded: {','.join(ACTIVITIES)} (default: CPU,GPU)"
    )
    what.add_argument("--no-shapes", action="store_true", help="do not record the shapes of tensors")
    return p


def _say(what: object, code: int) -> int:
    print(f"pdbench profile: {what}", file=sys.stderr)
    return code
