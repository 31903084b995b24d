"""The options of a client that makes a load together with others."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from pdbench.load.errors import LoadError
from pdbench.run.share import Share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("several clients", "each on its own host, all with the same load and seed")
    group.add_argument("--share", metavar="K/N", help="this is client K of N; the first one warms up and asks the servers")
    group.add_argument(
        "--meet", metavar="HOST:PORT", help="where the first client listens to the others, an address of its own host"
    )
    group.add_argument("--meet-key", type=Path, metavar="FILE", help="file with a secret that all of them know")


def read(args: argparse.Namespace) -> Share:
    """Return the client's share; raise LoadError for what cannot be."""
    given = [name for name in ("share", "meet", "meet_key") if getattr(args, name) is not None]
    if not given:
        return Share()
    if len(given) < 3:
        raise LoadError("--share, --meet and --meet-key go together: which client this is, where all meet, what they know")
    number, of = _share(args.share)
    if args.until:
        raise LoadError("--until does not go with --share: no client sees all requests; --max-time ends a point of several")
    host, _, port = args.meet.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or not 0 < int(port) < 65536:
        raise LoadError(f"--meet {args.meet!r}: write an address of the first client's host and a port, such as 127.0.0.1:8890")
    if host in ("0.0.0.0", "::", "*"):
        raise LoadError(f"--meet {args.meet!r}: name the address at which the other clients reach the first one, not all of them")
    try:
        key = args.meet_key.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as why:
        raise LoadError(f"cannot read --meet-key {args.meet_key}: {getattr(why, 'strerror', None) or why}") from None
    if len(key) < 16:
        raise LoadError(f"--meet-key {args.meet_key} must hold a secret of 16 characters or more")
    return Share(number, of, host, int(port), key)


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text, re.ASCII)
    number, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= of or of < 2:
        raise LoadError(f"--share {text!r}: write which client of how many this is, such as 1/2 and 2/2")
    return number, of
