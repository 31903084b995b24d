"""`pdbench run`: the command line, checked before anything is sent."""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pdbench.enough import parse
from pdbench.load.errors import LoadError
from pdbench.load.requests import Load
from pdbench.metrics import Slo
from pdbench.run import load_options, share_options
from pdbench.run.asks import PATHS, check_prompt_kind
from pdbench.run.bodies import Target
from pdbench.run.folder import Folder, recover
from pdbench.run.limits import make_room
from pdbench.run.load_options import above_zero, add_arguments, at_least, with_load_file
from pdbench.run.load_points import build
from pdbench.run.order import Plan
from pdbench.run.session import CannotMeasureError, Session
from pdbench.run.summary import Bounds, Setup
from pdbench.run.table import ending
from pdbench.trust import trusting

_EPILOG = f"""{load_options.HELP}

exit codes: 0 valid, 3 measured but invalid (summary.json says why), 2 bad usage, 1 could not measure.
A list of concurrencies or rates makes one load point each. Ctrl-C keeps what was recorded."""


def main(argv: list[str]) -> int:
    """Run the verb and return its exit code."""
    try:
        args = with_load_file(parser(), argv)
        if args.recover is not None:
            return _recover(args.recover)
        plan, folder = planned(args)
        folder.check()
        make_ready(plan)
    except LoadError as why:
        return _say(why, 2)
    except OSError as why:
        return _say(f"cannot write in {args.recover or args.output}: {why.strerror or why}", 1)
    try:
        return asyncio.run(_run(plan, folder))
    except CannotMeasureError as why:
        return _say(why, 1)
    except OSError as why:
        kept = f"; what was recorded stands in {folder.journal} (see --recover)" if folder.journal.exists() else ""
        return _say(f"cannot write in {args.output}: {why.strerror or why}{kept}", 1)
    except RuntimeError as why:
        return _say(f"gave up: {why or type(why).__name__}", 1)


def make_ready(plan: Plan) -> None:
    """Make sure that the process may open as many connections as the load needs; raise LoadError otherwise."""
    slots = max((load.concurrency or 1 for load in plan.loads), default=1)
    make_room(-(-slots // plan.share.of), plan.processes)


async def _run(plan: Plan, folder: Folder) -> int:
    return await Session(plan, folder).run()


def _say(what: object, code: int) -> int:
    print(f"pdbench run: {what}", file=sys.stderr)
    return code


def _recover(path: Path) -> int:
    _, summary = recover(path)
    print(ending(summary))
    return 3


def parser(profiled: bool = False) -> argparse.ArgumentParser:
    """Return the parser; ``profiled``: for `pdbench profile`, which adds to it and is one client that nothing recovers."""
    p = load_options.Parser(
        prog="pdbench run",
        description="Load an endpoint, record every request, summarise.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = p.add_argument_group("what is measured")
    where.add_argument("--url", help="scheme, host and port of the server or router, such as http://127.0.0.1:8000")
    where.add_argument("--api", choices=sorted(PATHS), default="completions", help="default: %(default)s")
    where.add_argument("--model", help="name that the server serves (not needed by --api generate)")
    where.add_argument("--api-key-file", type=Path, metavar="FILE", help="file that holds the key alone")
    where.add_argument(
        "--admin-api-key-file",
        type=Path,
        metavar="FILE",
        help="the same for what changes workers: slow_down, profiles, caches (default: --api-key-file)",
    )
    where.add_argument(
        "--ca-file", type=Path, metavar="FILE", help="with an https URL: whom to trust, PEM (default: the system's)"
    )
    where.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="plan.json: count its GPUs; before every point release slow_down and empty caches on its workers, ask them "
        "before and after",
    )
    where.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one request in all (default: 600)")
    where.add_argument("--scrape-interval", type=float, default=5.0, metavar="S", help="servers' /metrics; 0 is off (default: 5)")
    where.add_argument(
        "--until",
        metavar="FIGURE:PERCENT%[,...]",
        help="end a point before its last request when the 95 %% intervals are as narrow: ttft_p99:5%%,tpot_mean:2%%",
    )
    where.add_argument("--max-time", type=float, metavar="S", help="send no more after S measured seconds of a point")
    where.add_argument(
        "--stop-saturated",
        action="store_true",
        help="of a list of rates, measure none above the first that is over-saturated; end that one once it is certain",
    )
    where.add_argument("--processes", type=int, default=1, metavar="N", help="sending processes (default: 1)")
    add_arguments(p)
    if profiled:
        p.set_defaults(share=None, meet=None, meet_key=None)
    else:
        share_options.add_arguments(p)
    judge = p.add_argument_group("judgement")
    judge.add_argument(
        "--verify-outputs",
        type=int,
        default=0,
        metavar="N",
        help="before the first point, check the KV cache of N prompts over every prefill-decode pair of --plan (default: 0, off)",
    )
    for name, what in (("ttft", "time to first token"), ("tpot", "time per output token"), ("e2e", "whole request")):
        judge.add_argument(f"--slo-{name}-ms", type=float, metavar="MS", help=f"goodput: limit for the {what}")
    judge.add_argument("--max-loop-lag-ms", type=float, default=100.0, metavar="MS", help="client bound, p99 (default: 100)")
    judge.add_argument("--max-lateness-ms", type=float, default=100.0, metavar="MS", help="client bound, p99 (default: 100)")
    judge.add_argument("--min-delivered", type=float, default=0.9, metavar="SHARE", help="client bound (default: 0.9)")
    out = p.add_argument_group("output")
    out.add_argument("--output", type=Path, metavar="DIR", help="folder for summary.json, requests.parquet, ...")
    if not profiled:
        out.add_argument(
            "--recover", type=Path, metavar="DIR", help="make summary.json of a run that was killed, and nothing else"
        )
    return p


def planned(args: argparse.Namespace) -> tuple[Plan, Folder]:
    """Check every option and return what to do; raise LoadError at the first that is wrong."""
    if not args.output:
        raise LoadError("--output DIR is missing")
    deployment = None
    if args.plan:
        from pdbench.evidence import read_plan  # aiohttp takes a quarter of a second to import

        deployment = read_plan(args.plan)
    check_prompt_kind(args.api, args.prompt)
    sent = build(args, args.api, deployment is not None)
    if not args.model and args.api != "generate":
        raise LoadError(f"--model NAME is missing: --api {args.api} needs it")
    at_least(args, 1, "processes")
    at_least(args, 0, "scrape_interval", "min_delivered", "verify_outputs")
    if args.verify_outputs and deployment is None:
        raise LoadError("--verify-outputs goes with --plan, which names the prefill-decode pairs")
    above_zero(args, "timeout", "max_time", "slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms", "max_loop_lag_ms", "max_lateness_ms")
    if args.stop_saturated:
        _check_climb(sent.loads)
    setup = Setup(
        api=args.api,
        prompt=sent.kind,
        points=sent.described,
        ratio=deployment.ratio if deployment else None,
        gpus=deployment.gpus if deployment else None,
        slo=Slo(args.slo_ttft_ms, args.slo_tpot_ms, args.slo_e2e_ms),
        bounds=Bounds(args.max_loop_lag_ms, args.max_lateness_ms, args.min_delivered),
        verify_outputs=args.verify_outputs,
        no_gpu=deployment.no_gpu if deployment else "",
        truncated=deployment.truncated if deployment else "",
    )
    url = _url(args.url)
    if args.ca_file and not url.startswith("https:"):
        raise LoadError(f"--ca-file goes with an https URL, and --url is {url}")
    plan = Plan(
        url=url,
        target=Target(args.api, sent.kind, args.model or ""),
        loads=sent.loads,
        setup=setup,
        prompts=sent.prompts,
        warmup=args.warmup,
        timeout_s=args.timeout,
        headers=_headers("--api-key-file", args.api_key_file),
        admin=_headers("--admin-api-key-file", args.admin_api_key_file or args.api_key_file),
        ca=_certificates(args.ca_file) if args.ca_file else "",
        deployment=deployment,
        scrape_every_s=args.scrape_interval,
        processes=args.processes,
        until=parse(args.until) if args.until else (),
        max_time_s=args.max_time or math.inf,
        share=share_options.read(args),
        stop_saturated=args.stop_saturated,
    )
    return plan, Folder(args.output)


def _check_climb(loads: Sequence[Load]) -> None:
    rates = [load.rate for load in loads if load.rate is not None and load.rate_to is None]
    if len(rates) < len(loads) or rates != sorted(rates):
        raise LoadError(
            "--stop-saturated climbs: give rates in ascending order, such as --request-rate 2,4,8 (a closed loop waits for "
            "the servers and is never over-saturated; of a trace or a ramp it cannot be told)"
        )


def _url(url: str | None) -> str:
    parts = urlsplit(url or "")
    try:
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    path = parts.path.rstrip("/")
    if not good or path not in ("", "/v1") or parts.query or parts.fragment:
        shown = f"--url {url!r} is none" if url else "--url is missing"
        raise LoadError(f"{shown}: write scheme, host and port, such as http://127.0.0.1:8000")
    return f"{parts.scheme}://{parts.netloc}"


def _certificates(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as why:
        raise LoadError(f"--ca-file {path}: {why.strerror or why}") from None
    try:
        text = content.decode("ascii")
        trusting(text or "none")
    except (OSError, ValueError):
        raise LoadError(f"--ca-file {path}: it holds no certificate in PEM") from None
    return text


def _headers(option: str, key_file: Path | None) -> dict[str, str]:
    if key_file is None:
        return {}
    try:
        key = key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as why:
        raise LoadError(f"cannot read {option} {key_file}: {getattr(why, 'strerror', None) or why}") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise LoadError(f"{option} {key_file} must hold one key and nothing else")
    return {"Authorization": f"Bearer {key}"}
