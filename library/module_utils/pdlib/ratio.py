"""The ratio grammar: ``3p1d``, ``agg``, ``4agg``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict

from .errors import UserError

GRAMMAR = (
    "a ratio is NpMd (N prefill and M decode workers, both at least 1: 3p1d), agg (one aggregated worker) "
    "or Nagg (N aggregated workers behind the router: 4agg)"
)
ROLES = ("prefill", "decode", "aggregated")

_PD = re.compile(r"([0-9]+)p([0-9]+)d")
_AGG = re.compile(r"([0-9]*)agg")


@dataclass(frozen=True)
class Ratio:
    """How many workers of each role run.

    Laws: ``parse(str(r)) == r``; either ``aggregated`` is 0 and the two others are at least 1, or the reverse.
    """

    prefill: int = 0
    decode: int = 0
    aggregated: int = 0

    @property
    def disaggregated(self) -> bool:
        """Whether prefill and decode are separate workers."""
        return self.aggregated == 0

    def counts(self) -> Dict[str, int]:
        """Return the workers wanted per role, roles with none left out."""
        wanted = {"prefill": self.prefill, "decode": self.decode, "aggregated": self.aggregated}
        return {role: count for role, count in wanted.items() if count}

    def __str__(self) -> str:
        if self.disaggregated:
            return f"{self.prefill}p{self.decode}d"
        return "agg" if self.aggregated == 1 else f"{self.aggregated}agg"


def parse(text: str) -> Ratio:
    """Return the ratio that ``text`` names, in any case; raise UserError with the grammar for anything else."""
    lowered = text.lower() if isinstance(text, str) else ""
    pair, aggregated = _PD.fullmatch(lowered), _AGG.fullmatch(lowered)
    if pair and int(pair[1]) and int(pair[2]):
        return Ratio(prefill=int(pair[1]), decode=int(pair[2]))
    if aggregated and (aggregated[1] == "" or int(aggregated[1])):
        return Ratio(aggregated=int(aggregated[1] or 1))
    if lowered == "auto":
        raise UserError("ratio=auto is for the command line, and for one verb: ansible-playbook bench.yml -e ratio=auto")
    raise UserError(f"ratio={text!r} is not a ratio: {GRAMMAR}")
