"""`pdbench gate`: is a run to be believed? docs/validity.md says what is checked and why."""

from __future__ import annotations

from collections.abc import Callable

from pdbench.gate import calibrated, client, clients, cluster, correct, kv, leftovers, requests, transport
from pdbench.gate.check import Check
from pdbench.gate.rundata import Point, RunData

RUN_CHECKS: tuple[Callable[[RunData], Check], ...] = (client.files, client.state, transport.transport, correct.correct)
POINT_CHECKS: tuple[Callable[[RunData, Point], Check], ...] = (
    requests.accounted,
    requests.errors,
    requests.tokens,
    requests.prompts,
    requests.substance,
    requests.timing,
    requests.prefix_cache,
    cluster.ratio,
    cluster.served,
    cluster.engine_counts,
    cluster.restarted,
    leftovers.leftovers,
    kv.transfer_failures,
    kv.transferred,
    kv.moved_bytes,
    kv.computed,
    client.lag,
    client.lateness,
    client.load,
    calibrated.calibrated,
)


def judge(run: RunData) -> list[Check]:
    """Return the verdict of every check: on the run, then on each load point in turn."""
    checks = [check(run) for check in RUN_CHECKS] + clients.clients(run)
    return checks + [check(run, point) for point in run.points for check in POINT_CHECKS]


def main(argv: list[str]) -> int:
    """Run the verb; see pdbench.gate.cli."""
    from pdbench.gate.cli import main as run

    return run(argv)
