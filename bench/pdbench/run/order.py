"""Everything that a run is asked to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdbench.enough import Target as Goal
from pdbench.load.prompts import Prompts
from pdbench.load.requests import Load
from pdbench.run.bodies import Target
from pdbench.run.share import Share
from pdbench.run.summary import Setup

if TYPE_CHECKING:
    from pdbench.evidence import Deployment


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know; ``warmup`` None: as many requests as the concurrency (8 in an open loop).

    ``headers`` carry the key, where there is one, and ``admin`` that for what changes a worker;
    ``ca``: certificates (PEM) that alone are trusted, "" for the system's.
    """

    url: str
    target: Target
    loads: Sequence[Load]
    setup: Setup
    prompts: Prompts
    warmup: int | None
    timeout_s: float
    headers: Mapping[str, str]
    admin: Mapping[str, str]
    ca: str
    deployment: Deployment | None
    scrape_every_s: float
    processes: int = 1
    until: tuple[Goal, ...] = ()
    max_time_s: float = math.inf
    share: Share = field(default_factory=Share)
    stop_saturated: bool = False
