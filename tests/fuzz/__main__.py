"""`make fuzz MINUTES=5`: bad input for as long as one likes. The seed is printed, and of what fails the smallest input."""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from fuzz import SURFACES


def once(name: str, number: int, examples: int) -> str:
    """Try ``examples`` inputs of a surface; return "", or what broke with the smallest input that was found."""
    surface = SURFACES[name]

    @seed(number)
    @settings(
        database=None, deadline=None, max_examples=examples, suppress_health_check=list(HealthCheck), verbosity=Verbosity.normal,
        phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
    )  # fmt: skip
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        surface(data)

    try:
        tried()
    except (Exception, SystemExit):
        lines = traceback.format_exc(limit=-8).splitlines()
        return "\n".join(line if len(line) <= 400 else f"{line[:400]}... ({len(line)} characters)" for line in lines)
    return ""


def main() -> int:
    """Fuzz in rounds until the time is over; exit code 0: nothing found, 1: something."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of an earlier run, to see it again"
    )
    parser.add_argument("--examples", type=int, default=60, help="inputs of a surface in a round (default: 60)")
    parser.add_argument("--only", default=",".join(SURFACES), help=f"surfaces, of {', '.join(SURFACES)}")
    args = parser.parse_args()
    names = [name for name in args.only.split(",") if name in SURFACES]
    if not names or args.minutes <= 0 or len(names) != len(args.only.split(",")):
        parser.error(f"--only takes {', '.join(SURFACES)}; --minutes a number above 0")
    print(f"seed {args.seed}", flush=True)
    begin, rounds, bad = time.monotonic(), 0, set[str]()
    while time.monotonic() < begin + 60 * args.minutes and len(bad) < len(names):
        for name in names:
            if name in bad or time.monotonic() >= begin + 60 * args.minutes:
                continue
            if wrong := once(name, args.seed + rounds, args.examples):
                bad.add(name)
                print(f"\n{name}, --seed {args.seed + rounds} --only {name}:\n{wrong}", flush=True)
        rounds += 1
    tried, said = rounds * args.examples * len(names), ", ".join(sorted(bad)) or "none"
    print(f"seed {args.seed}: {rounds} rounds, about {tried} inputs of {len(names)} surfaces; failed: {said}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
