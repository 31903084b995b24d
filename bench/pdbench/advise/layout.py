"""One deployment as the model needs it: workers with their figures, and the ways of the KV cache between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from pdbench.model.cluster import Deployment
from pdbench.model.profile import Profile, ProfileError
from pdbench.model.rates import Rates
from pdbench.model.scheduler import Limits, Worker

Json = Mapping[str, Any]
#: flags of a worker that change what its profile says; the spelling of SGLang and of the emulator
FLAGS = ("mem-fraction-static", "chunked-prefill-size", "max-running-requests", "max-total-tokens", "num-reserved-decode-tokens")
_SHORT = {"--tensor-parallel-size": "--tp-size"}
#: what can be made faster (or larger) on its own, to see what would move a result
STAGES = ("prefill", "decode", "KV link", "KV memory", "front end")


@dataclass(frozen=True)
class Spot:
    """One worker: its profile by name, its GPUs, and those of `FLAGS` that it was started with."""

    profile: str
    gpus: int = 1
    flags: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Layout:
    """A ratio with its workers; ``ways``: how KV travels, [prefill][decode], each a transport of the profile."""

    ratio: str
    prefill: tuple[Spot, ...] = ()
    decode: tuple[Spot, ...] = ()
    aggregated: tuple[Spot, ...] = ()
    ways: tuple[tuple[str, ...], ...] = ()

    @property
    def gpus(self) -> int:
        """Return the GPUs of all workers."""
        return sum(spot.gpus for spot in (*self.prefill, *self.decode, *self.aggregated))


def alike(prefill: int, decode: int, aggregated: int, profile: str, gpus: int = 1, way: str = "cuda_ipc") -> Layout:
    """Return a layout of like workers of ``gpus`` GPUs each."""
    ratio = f"{prefill}p{decode}d" if prefill else "agg" if aggregated == 1 else f"{aggregated}agg"
    spot = Spot(profile, gpus)
    return Layout(ratio, (spot,) * prefill, (spot,) * decode, (spot,) * aggregated, ((way,) * decode,) * prefill)


def of_plan(plan: Json, profile_of: Callable[[str], str]) -> Layout:
    """Return the layout of a plan.json; ``profile_of`` gives the profile of a host's GPUs by the host's name."""
    spots: dict[str, list[Spot]] = {"prefill": [], "decode": [], "aggregated": []}
    names: dict[str, list[str]] = {role: [] for role in spots}
    for worker in plan["workers"]:
        ranks = worker["ranks"]
        gpus = sum(len(rank["gpus"]) for rank in ranks)
        spots[worker["role"]].append(Spot(profile_of(ranks[0]["host"]), max(1, gpus), _flags(ranks[0]["argv"])))
        names[worker["role"]].append(worker["name"])
    seen = {(pair["prefill"], pair["decode"]): pair["expected_transport"] for pair in plan["pairs"]}
    ways = tuple(tuple(seen[p, d] for d in names["decode"]) for p in names["prefill"])
    prefill, decode, aggregated = (tuple(spots[role]) for role in spots)
    return Layout(str(plan["ratio"]), prefill, decode, aggregated, ways)


def _flags(argv: Sequence[str]) -> tuple[tuple[str, float], ...]:
    found = {}
    for flag, value in pairwise(argv):
        name = _SHORT.get(flag, flag).removeprefix("--")
        if name in FLAGS:
            found[name] = float(value)
    return tuple(sorted(found.items()))


class _Faster(Rates):
    """Rates of which single stages take a share of the time; ``shares`` by the names of `STAGES`."""

    def __init__(self, profile: Profile, tp_size: int, shares: Mapping[str, float]) -> None:
        super().__init__(profile, tp_size)
        self._prefill, self._decode, self._link = (shares.get(name, 1.0) for name in ("prefill", "decode", "KV link"))

    def prefill_s(self, chunks: Any) -> float:
        return super().prefill_s(chunks) * self._prefill

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return super().decode_s(batch, context_tokens) * self._decode

    def transfer_s(self, size_bytes: int, transport: str) -> float:
        return super().transfer_s(size_bytes, transport) * self._link


def rates_of(spot: Spot, profiles: Mapping[str, Profile], faster: Mapping[str, float]) -> tuple[Rates, Limits]:
    """Return a worker's rates and limits; ``faster``: stage -> how many times as fast (or large) it is."""
    shares = {name: 1 / factor for name, factor in faster.items()}
    profile = profiles[spot.profile]
    if "front end" in shares:
        own = profile.engine
        cheaper = {
            name: getattr(own, name) * shares["front end"] for name in ("frontend_us_per_token", "frontend_us_per_request")
        }
        profile = replace(profile, engine=replace(own, **cheaper))
    if "KV link" in shares:
        nearer = {way: replace(one, latency_ms=one.latency_ms * shares["KV link"]) for way, one in profile.transports.items()}
        profile = replace(profile, transports=nearer)
    rates = _Faster(profile, spot.gpus, shares) if shares else Rates(profile, spot.gpus)
    flags, engine, room = dict(spot.flags), profile.engine, faster.get("KV memory", 1.0)
    capacity = flags.get("max-total-tokens")
    if capacity is None:
        capacity = rates.capacity_tokens(flags.get("mem-fraction-static"))
    own_limits = Limits(
        capacity=int(capacity * room),
        max_running=int(flags.get("max-running-requests", engine.max_running_requests) * room),
        chunk=int(flags.get("chunked-prefill-size", engine.chunked_prefill_tokens)),
        reserved=int(flags.get("num-reserved-decode-tokens", engine.reserved_decode_tokens)),
        prefix_cache=False,
    )
    return rates, own_limits


def build(layout: Layout, profiles: Mapping[str, Profile], faster: Mapping[str, float] | None = None) -> Deployment:
    """Return the layout's workers, idle. Raise ProfileError when a model does not fit its GPUs."""
    made: dict[Spot, tuple[Rates, Limits]] = {}

    def worker(spot: Spot) -> Worker:
        if spot not in made:
            try:
                made[spot] = rates_of(spot, profiles, faster or {})
            except ProfileError as why:
                raise ProfileError(f"{layout.ratio}, profile {spot.profile}: {why}") from None
        return Worker(*made[spot])

    prefill, decode, both = ([worker(spot) for spot in spots] for spots in (layout.prefill, layout.decode, layout.aggregated))
    return Deployment(prefill, decode, both, transport=lambda here, there: layout.ways[here][there])
