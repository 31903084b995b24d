"""`pdbench run`: the command line, checked before anything is sent."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from pdbench.evidence import read_plan
from pdbench.load.arrivals import ARRIVALS
from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.load.prompts import Prompts, TokenRange
from pdbench.load.requests import Load
from pdbench.load.trace import Row, Scaling, read_trace
from pdbench.metrics import Slo
from pdbench.run.asks import PATHS, PROMPT_KINDS, check_prompt_kind
from pdbench.run.folder import Folder, recover
from pdbench.run.point import Target
from pdbench.run.session import CannotMeasureError, Plan, Session
from pdbench.run.summary import Bounds, Json, Setup
from pdbench.run.table import render

_EPILOG = """exit codes: 0 valid, 3 measured but invalid (summary.json says why), 2 bad usage, 1 could not measure.
A list of concurrencies or rates makes one load point each. Ctrl-C keeps what was recorded."""


def main(argv: list[str]) -> int:
    """Run the verb and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        if args.recover is not None:
            return _recover(args.recover)
        plan, folder = _plan(args)
        folder.check()
    except LoadError as why:
        return _say(why, 2)
    except OSError as why:
        return _say(f"cannot write in {args.recover or args.output}: {why.strerror or why}", 1)
    try:
        return uvloop.run(_run(plan, folder))
    except CannotMeasureError as why:
        return _say(why, 1)
    except OSError as why:
        kept = f"; what was recorded stands in {folder.journal} (see --recover)" if folder.journal.exists() else ""
        return _say(f"cannot write in {args.output}: {why.strerror or why}{kept}", 1)
    except RuntimeError as why:
        return _say(f"gave up: {why or type(why).__name__}", 1)


async def _run(plan: Plan, folder: Folder) -> int:
    return await Session(plan, folder).run()


def _say(what: object, code: int) -> int:
    print(f"pdbench run: {what}", file=sys.stderr)
    return code


def _recover(path: Path) -> int:
    _, summary = recover(path)
    points = summary["points"]
    assert isinstance(points, list)
    print(render(points))
    return 3


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
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
        "--plan",
        type=Path,
        metavar="FILE",
        help="plan.json: count its GPUs; before every point release slow_down and empty caches on its workers, ask them "
        "before and after",
    )
    where.add_argument("--scrape-interval", type=float, default=5.0, metavar="S", help="servers' /metrics; 0 is off (default: 5)")
    load = p.add_argument_group("load")
    load.add_argument("--concurrency", metavar="N[,N]", help="closed loop: requests in flight")
    load.add_argument("--request-rate", metavar="R[,R]", help="open loop: requests/s, sent on time whatever the server does")
    load.add_argument("--arrival", choices=ARRIVALS, help="of an open loop (default: poisson)")
    load.add_argument("--num-requests", type=int, metavar="N", help="measured requests at each load point")
    load.add_argument("--isl", metavar="N|MIN-MAX", help="prompt length in tokens: fixed, or uniform in a range")
    load.add_argument("--osl", metavar="N|MIN-MAX", help="output length in tokens, forced")
    load.add_argument("--warmup", type=int, metavar="N", help="requests before each point (default: as many as are in flight)")
    load.add_argument(
        "--verify-outputs",
        type=int,
        default=0,
        metavar="N",
        help="before the first point, check the KV cache of N prompts over every prefill-decode pair of --plan (default: 0, off)",
    )
    load.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed sends the same requests (default: 0)")
    load.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one request in all (default: 600)")
    trace = p.add_argument_group("trace")
    trace.add_argument("--trace", type=Path, metavar="FILE", help="lengths from a Mooncake trace instead of --isl and --osl")
    trace.add_argument(
        "--time-scale", type=float, metavar="S", help="send at the trace's times multiplied by S (0.5: twice as fast)"
    )
    trace.add_argument("--length-scale", type=float, metavar="F", help="multiply the trace's lengths (default: 1)")
    trace.add_argument("--max-isl", type=int, metavar="N", help="cut longer prompts of the trace")
    trace.add_argument("--max-osl", type=int, metavar="N", help="cut longer outputs of the trace")
    prompt = p.add_argument_group("prompts")
    prompt.add_argument(
        "--prompt", choices=PROMPT_KINDS, default="auto", help="token ids are exact; auto: token ids, text where they are refused"
    )
    prompt.add_argument("--token-ids", default="300-3800", metavar="LOW-HIGH", help="ids to draw from (default: %(default)s)")
    judge = p.add_argument_group("judgement")
    for name, what in (("ttft", "time to first token"), ("tpot", "time per output token"), ("e2e", "whole request")):
        judge.add_argument(f"--slo-{name}-ms", type=float, metavar="MS", help=f"goodput: limit for the {what}")
    judge.add_argument("--max-loop-lag-ms", type=float, default=100.0, metavar="MS", help="client bound, p99 (default: 100)")
    judge.add_argument("--max-lateness-ms", type=float, default=100.0, metavar="MS", help="client bound, p99 (default: 100)")
    judge.add_argument("--min-delivered", type=float, default=0.9, metavar="SHARE", help="client bound (default: 0.9)")
    out = p.add_argument_group("output")
    out.add_argument("--output", type=Path, metavar="DIR", help="folder for summary.json, requests.parquet, ...")
    out.add_argument("--recover", type=Path, metavar="DIR", help="make summary.json of a run that was killed, and nothing else")
    return p


def _plan(args: argparse.Namespace) -> tuple[Plan, Folder]:
    """Check every option and return what to do; raise LoadError at the first that is wrong."""
    if not args.output:
        raise LoadError("--output DIR is missing")
    deployment = read_plan(args.plan) if args.plan else None
    loads = _loads(args)
    check_prompt_kind(args.api, args.prompt)
    if not args.model and args.api != "generate":
        raise LoadError(f"--model NAME is missing: --api {args.api} needs it")
    _at_least(args, 0, "warmup", "scrape_interval", "min_delivered", "verify_outputs")
    if args.verify_outputs and deployment is None:
        raise LoadError("--verify-outputs goes with --plan, which names the prefill-decode pairs")
    _above_zero(args, "timeout", "slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms", "max_loop_lag_ms", "max_lateness_ms")
    setup = Setup(
        api=args.api,
        prompt=args.prompt,
        points=[_asked(args, load) for load in loads],
        ratio=deployment.ratio if deployment else None,
        gpus=deployment.gpus if deployment else None,
        slo=Slo(args.slo_ttft_ms, args.slo_tpot_ms, args.slo_e2e_ms),
        bounds=Bounds(args.max_loop_lag_ms, args.max_lateness_ms, args.min_delivered),
        verify_outputs=args.verify_outputs,
    )
    plan = Plan(
        url=_url(args.url),
        target=Target(args.api, args.prompt, args.model or ""),
        loads=loads,
        setup=setup,
        prompts=Prompts(args.seed, TokenRange.parse(args.token_ids)),
        warmup=args.warmup,
        timeout_s=args.timeout,
        headers=_headers(args.api_key_file),
        deployment=deployment,
        scrape_every_s=args.scrape_interval,
    )
    return plan, Folder(args.output)


def _loads(args: argparse.Namespace) -> list[Load]:
    rows, count = _rows(args)
    isl, osl = (None, None) if rows else (_lengths(args, "isl"), _lengths(args, "osl"))
    concurrencies = [int(n) for n in _numbers("--concurrency", args.concurrency, whole=True)]
    rates = _numbers("--request-rate", args.request_rate, whole=False)
    if args.arrival and not rates:
        raise LoadError("--arrival goes with --request-rate")
    common = {"isl": isl, "osl": osl, "count": count, "seed": args.seed, "rows": rows}
    if args.time_scale is not None:
        if rates or not rows:
            raise LoadError("--time-scale replays the times of a --trace, and takes no --request-rate beside it")
        return [Load(**common, replay=args.time_scale)]
    if rates:
        return [Load(**common, rate=rate, arrival=args.arrival or "poisson") for rate in rates]
    if not concurrencies:
        raise LoadError("say how much load: --concurrency N (closed loop) or --request-rate R (open loop)")
    return [Load(**common, concurrency=n) for n in concurrencies]


def _rows(args: argparse.Namespace) -> tuple[list[Row], int]:
    _at_least(args, 1, "num_requests", "max_isl", "max_osl")
    _above_zero(args, "length_scale", "time_scale")
    if args.trace is None:
        for name in ("time_scale", "length_scale", "max_isl", "max_osl"):
            if getattr(args, name) is not None:
                raise LoadError(f"--{name.replace('_', '-')} goes with --trace")
        if args.num_requests is None:
            raise LoadError("--num-requests N is missing")
        return [], args.num_requests
    for name in ("isl", "osl"):
        if getattr(args, name) is not None:
            raise LoadError(f"--{name} does not go with --trace, which has its own lengths: --max-{name} cuts them")
    scaling = Scaling(args.length_scale or 1.0, args.max_isl, args.max_osl)
    rows = read_trace(args.trace, scaling, args.num_requests)
    return rows, len(rows)


def _lengths(args: argparse.Namespace, name: str) -> Lengths:
    text = getattr(args, name)
    if text is None:
        raise LoadError(f"--{name} is missing: a number of tokens (512) or a range (256-512)")
    try:
        return Lengths.parse(text)
    except LoadError as why:
        raise LoadError(f"--{name}: {why}") from None


def _numbers(option: str, text: str | None, whole: bool) -> list[float]:
    if text is None:
        return []
    try:
        found = [float(int(word) if whole else float(word)) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < n < float("inf") for n in found):
        kind = "whole numbers from 1 up, such as 32,64,128" if whole else "numbers above 0, such as 2,4,8"
        raise LoadError(f"{option} {text!r}: write {kind}")
    return found


def _at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value < float("inf"):
            raise LoadError(f"--{name.replace('_', '-')} must be at least {least}, not {value:g}")


def _above_zero(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise LoadError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")


def _asked(args: argparse.Namespace, load: Load) -> Json:
    """Return what summary.json says of a load point beside its figures."""
    return {
        "concurrency": load.concurrency,
        "request_rate": load.rate,
        "arrival": load.arrival if load.rate is not None else None,
        "time_scale": load.replay,
        "isl": str(load.isl) if load.isl else None,
        "osl": str(load.osl) if load.osl else None,
        "trace": args.trace.name if args.trace else None,
        "length_scale": args.length_scale,
        "max_isl": args.max_isl,
        "max_osl": args.max_osl,
        "num_requests": load.count,
        "seed": args.seed,
    }


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


def _headers(key_file: Path | None) -> dict[str, str]:
    if key_file is None:
        return {}
    try:
        key = key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as why:
        raise LoadError(f"cannot read --api-key-file {key_file}: {getattr(why, 'strerror', None) or why}") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise LoadError(f"--api-key-file {key_file} must hold one key and nothing else")
    return {"Authorization": f"Bearer {key}"}
