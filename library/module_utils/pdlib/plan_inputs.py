"""What a plan is made from, and the groups that an inventory must have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, FrozenSet, Mapping, Optional, Sequence

from . import ratio as ratios
from .errors import UserError, listing

GROUPS = ("prefill_nodes", "decode_nodes", "router", "bench_clients")
ROLE_GROUPS = {"prefill": ("prefill_nodes",), "decode": ("decode_nodes",), "aggregated": ("prefill_nodes", "decode_nodes")}

Json = Dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """All that a plan is made from.

    ``groups``: group -> hosts in inventory order; ``cluster`` and ``hosts``: typed settings (settings.py); ``limit``: the
    hosts of ``--limit``, None without one; ``current``: the deployed plan; ``discovered``: host -> facts found there;
    ``overrides``: the extra-vars that the deployment is made with (no secrets); ``tls_ca``: what clients of the router trust.
    """

    groups: Mapping[str, Sequence[str]]
    cluster: Mapping[str, Any]
    hosts: Mapping[str, Mapping[str, Any]]
    limit: Optional[FrozenSet[str]] = None
    current: Optional[Json] = None
    discovered: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tls_ca: str = ""


def check_group_names(groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse an inventory that lacks one of our groups (it may be empty, it may not be absent)."""
    absent = [name for name in GROUPS if name not in groups]
    if absent:
        raise UserError(
            f"the inventory has no group {listing(absent)}: every inventory defines {listing(GROUPS)}, empty if unused"
        )


def check_groups(groups: Mapping[str, Sequence[str]], ratio: ratios.Ratio) -> None:
    """Refuse groups in which the ratio cannot find its hosts."""
    check_group_names(groups)
    if len(groups["router"]) != 1:
        raise UserError(f"the group router has {len(groups['router'])} hosts ({listing(groups['router'])}): it takes exactly one")
    for role in ratio.counts():
        if not any(groups[group] for group in ROLE_GROUPS[role]):
            raise UserError(f"ratio {ratio} needs hosts in {' or '.join(ROLE_GROUPS[role])}, and there is none")
