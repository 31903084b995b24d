"""The `selfcheck` verb: the command line and the table."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from pdbench import __version__
from pdbench.records import write_json
from pdbench.selfcheck import truth
from pdbench.selfcheck.judge import TOO_SLOW, Finding, shape, worst
from pdbench.selfcheck.measure import CannotCheckError, Server, check_point, own_server
from pdbench.verbs import ends_by_code

#: Tokens a second that the server sends at most: a third of a core of its own (15 us a token).
MOST_RATE = 25_000.0

_EPILOG = """grades: A the TTFT is right to 1 ms on average and 10 ms at p99, B to 10 and 50 ms, C to 50 and 200 ms;
F this client is too slow. What stands behind -- goes to `pdbench run` as it is: pdbench selfcheck -- --prompt text
exit codes: 0 the client keeps up, 3 it does not, 2 bad usage, 1 could not check."""


@ends_by_code
def main(argv: list[str]) -> int:
    """Run the verb and return its exit code."""
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = _parser().parse_args(own)
    if args.listen is not None:
        return _listen(args.listen)
    before = signal.signal(signal.SIGTERM, _stopped)
    try:
        with tempfile.TemporaryDirectory(prefix="pdbench-selfcheck-") as folder:
            report = _check(args, more, Path(folder))
    except CannotCheckError as why:
        return _could_not(args.json, str(why))
    except KeyboardInterrupt:
        return _could_not(args.json, "stopped")
    finally:
        signal.signal(signal.SIGTERM, before)
    if args.json and not _written(args.json, report):
        return 1
    return 0 if report["keeps_up"] else 3


def _stopped(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _could_not(path: Path | None, why: str) -> int:
    print(f"pdbench selfcheck: {why}", file=sys.stderr)
    if path:
        _written(path, {"schema": 1, "pdbench": __version__, "error": why, "keeps_up": False, "points": []})
    return 1


def _written(path: Path, report: object) -> bool:
    try:
        write_json(path, report)
    except OSError as why:
        print(f"pdbench selfcheck: cannot write {path}: {why.strerror or why}", file=sys.stderr)
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="pdbench selfcheck",
        description="Run `pdbench run` against a server that knows when it sent what, and say how wrong it is here and now.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--concurrency", type=_counts, default=[32], metavar="N[,N]", help="requests in flight (default: 32)")
    p.add_argument("--osl", type=_count, default=128, metavar="N", help="tokens an answer (default: 128)")
    p.add_argument("--isl", type=_count, default=64, metavar="N", help="tokens a prompt (default: 64)")
    p.add_argument("--ttft-ms", type=_above_zero, default=50.0, metavar="MS", help="the true TTFT (default: 50)")
    p.add_argument(
        "--itl-ms", type=_above_zero, default=20.0, metavar="MS", help="the true ITL (default: 20; longer at high load)"
    )
    p.add_argument("--seconds", type=_above_zero, metavar="S", help="cut the answers so that the load lasts about so long")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the findings there")
    where = p.add_mutually_exclusive_group()
    where.add_argument("--listen", metavar="ADDRESS:PORT", type=_address, help="be the server for --against, until Ctrl-C")
    where.add_argument("--against", metavar="URL", type=_url, help="a server that listens elsewhere: the path counts, too")
    return p


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 0 < int(text) <= 1_000_000:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")


def _counts(text: str) -> list[int]:
    return [_count(word) for word in text.split(",")]


def _above_zero(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if host and 0 <= int(port) < 65536:
            return host, int(port)
    # All addresses only for who says so: 0.0.0.0:9000.
    raise argparse.ArgumentTypeError(f"{text!r} is no address and port of this host, such as 192.0.2.7:9000")


def _url(text: str) -> str:
    parts = urlsplit(text)
    with contextlib.suppress(ValueError):
        if parts.scheme == "http" and parts.hostname and parts.port and parts.path in ("", "/"):
            return f"http://{parts.netloc}"
    raise argparse.ArgumentTypeError(f"{text!r}: write http, host and port, such as http://127.0.0.1:9000")


def _listen(address: tuple[str, int]) -> int:
    truth.many_files()
    try:
        server = truth.Truth(*address)
    except OSError as why:
        print(f"pdbench selfcheck: cannot listen on {address[0]}:{address[1]}: {why.strerror or why}", file=sys.stderr)
        return 1
    print(f"port {server.port}: pdbench selfcheck --against http://THIS-HOST:{server.port}    (Ctrl-C ends it)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve(None)
    return 0


def _check(args: argparse.Namespace, more: Sequence[str], folder: Path) -> dict[str, object]:
    cpus = len(os.sched_getaffinity(0))
    with own_server() if args.against is None else contextlib.nullcontext(Server(args.against)) as server:
        server.check()
        path_ms = server.path_ms() if args.against else 0.0
        where = f"{args.against}, {path_ms:.2f} ms there and back" if args.against else "a server on this machine"
        print(f"pdbench {__version__} against {where}; {cpus} cores here; errors are client minus server", flush=True)
        print(_HEADER)
        findings = []
        share = args.seconds / len(args.concurrency) if args.seconds else None
        for number, concurrency in enumerate(args.concurrency):
            asked = shape(concurrency, args.osl, args.ttft_ms, args.itl_ms, MOST_RATE, share)
            found = check_point(server, asked, args.ttft_ms, args.isl, more, folder / str(number), path_ms)
            findings.append(found)
            print(_row(found), flush=True)
    grade = worst([found.grade for found in findings])
    print("\n".join(_words(findings, cpus)))
    return {
        "schema": 1,
        "pdbench": __version__,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpus": cpus,
        "against": args.against,
        "path_ms": path_ms,
        "output_tokens_asked": args.osl,
        "run_options": list(more),
        "grade": grade,
        "keeps_up": grade != TOO_SLOW,
        "points": [found.to_json() for found in findings],
    }


_HEADER = (
    f"{'in flight':>9} {'tokens':>6} {'ITL':>6} {'tokens/s':>9} {'delivered':>9} {'TTFT error mean / p99':>23} "
    f"{'ITL error':>10} {'cores':>6} {'others':>6}  grade"
)


def _row(found: Finding) -> str:
    mean, p99, gap = found.ttft_wrong_by["mean"], found.ttft_wrong_by["p99"], found.itl_wrong_by["mean"]
    ttft = "-" if mean is None or p99 is None else f"{mean:+.1f} / {p99:+.1f} ms"
    itl = "-" if gap is None else f"{gap:+.2f} ms"
    cores = "-" if found.client_cores is None else f"{found.client_cores:.2f}"
    return (
        f"{found.concurrency:>9} {found.tokens:>6} {found.itl_ms:>6.1f} {found.tokens_per_s:>9,.0f} {found.delivered:>9.1%} "
        f"{ttft:>23} {itl:>10} {cores:>6} {found.other_cores:>6.1f}  {found.grade}"
    )


def _words(findings: Sequence[Finding], cpus: int) -> list[str]:
    lines = [f"in flight {found.concurrency}: {reason}" for found in findings for reason in found.reasons]
    good = [found for found in findings if found.grade != TOO_SLOW]
    if good:
        mean, p99 = (max(found.trusted_from_ms.get(name, 0.0) for found in good) for name in ("mean", "p99"))
        lines.append(f"right to a tenth: a mean TTFT from {mean:.0f} ms up, a p99 TTFT from {p99:.0f} ms up")
    most = [found.most_tokens_per_s for found in findings if found.most_tokens_per_s]
    if most:
        lines.append(f"by the CPU that it used, this client can take in about {max(most):,.0f} tokens/s")
    busy = max((found.other_cores for found in findings), default=0.0)
    if busy > cpus / 4:
        lines.append(f"other programs held {busy:.1f} of {cpus} cores meanwhile")
    return lines
