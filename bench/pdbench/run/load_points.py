"""From options to load points: what is sent, checked before anything is."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pdbench.load.arrivals import Rate, check_arrival, schedule_for
from pdbench.load.dataset import Entry, read_dataset
from pdbench.load.errors import LoadError
from pdbench.load.lengths import Lengths
from pdbench.load.prompts import WORDS, Prompts, TokenRange
from pdbench.load.requests import Conversation, Load, Prefix
from pdbench.load.tokenizer import Tokenizer
from pdbench.load.trace import Row, Scaling, read_trace
from pdbench.run.load_options import PACES, above_zero, at_least, number, numbers, option

#: what goes with each way to say how much load
_TAKES = {
    "concurrency": ("num_requests",),
    "request_rate": ("num_requests", "duration", "arrival", "to"),
    "time_scale": ("num_requests", "duration"),
    "batch": (),
}
_CONVERSATION = {"turns": "", "think": "0", "context": "full"}


@dataclass(frozen=True)
class _Stage:
    """One load point as it is asked for; ``replay`` is set where a trace gives the times. ``count`` None: all there is."""

    concurrency: int | None = None
    rate: float | None = None
    arrival: str = "poisson"
    to: float | None = None
    duration: float | None = None
    count: int | None = None
    replay: float | None = None
    batch: bool = False


@dataclass(frozen=True)
class Loads:
    """The load points, and what summary.json says of each beside its figures; where prompts come from; of which kind.

    ``kind`` is --prompt, decided where a file of prompts decides it.
    """

    loads: list[Load]
    described: list[dict[str, object]]
    prompts: Prompts
    kind: str


def build(args: argparse.Namespace, api: str, empties_caches: bool) -> Loads:
    """Return what is sent; raise LoadError at the first thing that is wrong.

    ``empties_caches``: the servers' prefix caches are emptied before each point.
    """
    _check(args)
    stages = _stages(args)
    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    kind = args.prompt
    rows: list[Row] = []
    entries: list[Entry] = []
    counts = [stage.count for stage in stages]
    most = None if None in counts else max(count for count in counts if count is not None)
    scaling = Scaling(args.length_scale or 1.0, args.max_isl, args.max_osl)
    if args.trace:
        rows = read_trace(args.trace, scaling, most)
    elif args.dataset:
        if len(stages) > 1 and not empties_caches:
            raise LoadError(
                "a --dataset's prompts are the same at every load point: take one point a run, or give --plan, with which "
                "caches are emptied before each"
            )
        entries, kind = _entries(args, api, tokenizer, most)
    elif None in counts:
        raise LoadError("--num-requests N is missing")
    if args.share_prefixes and not any(row.blocks for row in rows):
        raise LoadError(f"--share-prefixes: {args.trace} has no hash_ids")
    prefix = Prefix(args.prefix_len, _groups(args)) if args.prefix_len else None
    common = {
        "isl": _length(args, "isl"),
        "osl": _length(args, "osl"),
        "seed": args.seed,
        "rows": rows,
        "scaling": scaling,
        "share": args.share_prefixes,
        "prefix": prefix,
        "conversation": _conversation(getattr(args, "conversation", None)),
        "entries": entries,
    }
    loads = [_load(stage, common) for stage in stages]
    described = [_described(args, stage, load) for stage, load in zip(stages, loads, strict=True)]
    words = tokenizer.words() if tokenizer and kind != "tokens" and not entries else WORDS
    added = tokenizer.added if tokenizer else 0
    return Loads(loads, described, Prompts(args.seed, TokenRange.parse(args.token_ids), words, added), kind)


def _check(args: argparse.Namespace) -> None:
    at_least(args, 1, "num_requests", "max_isl", "max_osl", "prefix_len")
    at_least(args, 0, "warmup")
    above_zero(args, "length_scale", "time_scale", "duration")
    if args.trace is None:
        for name in ("time_scale", "length_scale"):
            if getattr(args, name) is not None:
                raise LoadError(f"{option(name)} goes with --trace")
        if args.share_prefixes:
            raise LoadError("--share-prefixes goes with --trace (--prefix-len shares a system prompt)")
    if args.trace and args.dataset:
        raise LoadError("--trace and --dataset are two loads; give one")
    if args.dataset and args.isl is not None:
        raise LoadError("--isl does not go with --dataset, which has its own prompts: --max-isl leaves long ones out")
    for name in ("isl", "osl"):
        if args.trace and getattr(args, name) is not None:
            raise LoadError(f"--{name} does not go with --trace, which has its own lengths: --max-{name} cuts them")
        if not args.trace and not args.dataset and getattr(args, name) is None:
            raise LoadError(f"--{name} is missing: a number of tokens (512), a range (256-512), or another length (--help)")
    if args.trace or args.dataset:
        for name in ("prefix_len", "conversation"):
            if getattr(args, name, None) is not None:
                raise LoadError(f"{option(name)} goes with prompts that are made up, not with --trace or --dataset")
    if args.prefix_len is None and getattr(args, "prefix_groups", None) is not None:
        raise LoadError("prefix_groups goes with prefix_len")


def _stages(args: argparse.Namespace) -> list[_Stage]:
    given = [name for name in (*PACES, "time_scale", "stages") if getattr(args, name, None) is not None]
    if not given:
        raise LoadError("say how much load: --concurrency N (closed loop), --request-rate R (open loop) or --batch N")
    if len(given) > 1:
        raise LoadError(f"{' and '.join(map(option, given))} are ways to say how much load; give one")
    (name,) = given
    common = {key: getattr(args, key) for key in ("num_requests", "duration", "arrival") if getattr(args, key) is not None}
    if name != "stages":
        values = [args.time_scale] if name == "time_scale" else numbers(name, getattr(args, name))
        return [_stage(args.seed, name, {name: value, **common}) for value in values]
    found = []
    for place, stage in enumerate(args.stages if isinstance(args.stages, list) and args.stages else [None], 1):
        try:
            found.append(_listed(args.seed, stage, common))
        except LoadError as why:
            raise LoadError(f"{args.load}: stage {place}: {why}") from None
    return found


def _listed(seed: int, stage: object, common: Mapping[str, object]) -> _Stage:
    """Return a stage of a load file: what it says itself, and what is said for all where it takes that."""
    keys = list(stage) if isinstance(stage, dict) else []
    paces = [key for key in keys if key in PACES]
    if not isinstance(stage, dict) or len(paces) != 1:
        raise LoadError("say one of concurrency, request_rate and batch, such as {concurrency: 32, num_requests: 200}")
    (name,) = paces
    odd = [str(key) for key in keys if key not in (name, *_TAKES[name])]
    if odd:
        raise LoadError(f"{odd[0]!r} does not go with {name}, which takes: {', '.join(_TAKES[name]) or 'nothing else'}")
    ends = {"num_requests", "duration"}
    for key, value in common.items():
        if key in _TAKES[name] and key not in stage and not (key in ends and ends & set(keys)):
            stage = {**stage, key: value}
    return _stage(seed, name, stage)


def _stage(seed: int, name: str, said: Mapping[str, object]) -> _Stage:
    """Return the load point that the pace ``name`` and what goes with it make."""
    for key in said:
        if key not in (name, *_TAKES[name]):
            takers = " or ".join(option(pace) for pace, keys in _TAKES.items() if key in keys)
            raise LoadError(f"{option(key)} goes with {takers}, not with {option(name)}")
    if "num_requests" in said and "duration" in said:
        raise LoadError("--num-requests and --duration both say where to end; give one")
    value = number(name, said[name])
    count = int(number("num_requests", said["num_requests"])) if "num_requests" in said else None
    duration = number("duration", said["duration"]) if "duration" in said else None
    if name in ("concurrency", "batch"):
        return _Stage(concurrency=int(value), count=int(value) if name == "batch" else count, batch=name == "batch")
    if name == "time_scale":
        return _Stage(replay=value, count=count, duration=duration)
    arrival = str(said.get("arrival", "poisson"))
    check_arrival(arrival)
    stage = _Stage(rate=value, arrival=arrival, to=number("to", said["to"]) if "to" in said else None)
    if duration is None:
        if stage.to is not None:
            raise LoadError("a ramp (to) needs its duration in seconds")
        return replace(stage, count=count)
    pace = Rate(value, stage.to, duration if stage.to is not None else 0.0)
    due = schedule_for(arrival, pace, duration, random.Random(f"{seed}/arrivals"))
    return replace(stage, duration=duration, count=len(due))


def _load(stage: _Stage, common: Mapping[str, Any]) -> Load:
    rows, entries = common["rows"], common["entries"]
    count = stage.count or len(rows) or len(entries)
    if stage.replay is not None and stage.duration is not None:
        count = sum(row.arrival_s * stage.replay < stage.duration for row in rows)
    return Load(
        **common,
        count=count,
        concurrency=stage.concurrency,
        rate=stage.rate,
        arrival=stage.arrival,
        replay=stage.replay,
        rate_to=stage.to,
        ramp_s=stage.duration or 0.0 if stage.to is not None else 0.0,
    )


def _described(args: argparse.Namespace, stage: _Stage, load: Load) -> dict[str, object]:
    return {
        "concurrency": load.concurrency,
        "batch": stage.batch,
        "request_rate": load.rate,
        "request_rate_to": load.rate_to,
        "arrival": load.arrival if load.rate is not None else None,
        "time_scale": load.replay,
        "duration_s": stage.duration,
        "duration": stage.duration,  # the one of summary.json that was asked for: duration_s is what came of it
        "isl": str(load.isl) if load.isl else None,
        "osl": str(load.osl) if load.osl else None,
        "trace": args.trace.name if args.trace else None,
        "dataset": args.dataset.name if args.dataset else None,
        "length_scale": args.length_scale,
        "max_isl": args.max_isl,
        "max_osl": args.max_osl,
        "prefix_len": args.prefix_len,
        "prefix_groups": load.prefix.groups if load.prefix else None,
        "conversation": getattr(args, "conversation", None),
        "shared_prefix": load.shared_prefix,
        "num_requests": load.count,
        "seed": args.seed,
    }


def _entries(args: argparse.Namespace, api: str, tokenizer: Tokenizer | None, most: int | None) -> tuple[list[Entry], str]:
    """Return the file's requests, and whether they are sent as token ids or text."""
    measure = tokenizer.count if tokenizer else lambda text: len(text.split())
    entries = read_dataset(args.dataset, most, measure, tokenizer is not None, args.max_isl)
    content = entries[0].content
    if args.osl is None and (silent := next((e for e in entries if not e.osl), None)):
        shown = json.dumps(silent.content, ensure_ascii=False)[:60]
        raise LoadError(
            f"--osl is missing: {args.dataset} does not say how many output_tokens each prompt wants, such as {shown} "
            "(--tokenizer counts the answers of ShareGPT)"
        )
    if isinstance(content, str):
        if args.prompt == "tokens" and tokenizer is None:
            raise LoadError("--prompt tokens with text of a --dataset needs the model's --tokenizer")
        if api == "chat" or tokenizer is None or args.prompt == "text":
            return entries, "text"
        ids = [list(tokenizer.encode(str(entry.content), True)) for entry in entries]
        return [replace(e, content=found, isl=len(found)) for e, found in zip(entries, ids, strict=True)], "tokens"
    if isinstance(content[0], dict):
        if api != "chat":
            raise LoadError(f"{args.dataset} holds messages: they go with --api chat")
        return entries, "text"
    if api == "chat" or args.prompt == "text":
        raise LoadError(f"{args.dataset} holds token ids: they go with --api completions or generate, and not with --prompt text")
    return entries, "tokens"


def _conversation(said: object) -> Conversation | None:
    if said is None:
        return None
    if not isinstance(said, dict) or set(said) - set(_CONVERSATION) or "turns" not in said:
        raise LoadError("conversation: write turns, think and context, such as {turns: 2-6, think: 1-5, context: full}")
    try:
        return Conversation.parse(*(str(said.get(key, default)) for key, default in _CONVERSATION.items()))
    except LoadError as why:
        raise LoadError(f"conversation: {why}") from None


def _groups(args: argparse.Namespace) -> int:
    groups = getattr(args, "prefix_groups", None)
    if groups is not None and (isinstance(groups, bool) or not isinstance(groups, int) or groups < 1):
        raise LoadError(f"prefix_groups: {groups!r}; write a whole number from 1 up")
    return groups or 1


def _length(args: argparse.Namespace, name: str) -> Lengths | None:
    text = getattr(args, name)
    if text is None:
        return None
    try:
        return Lengths.parse(text)
    except LoadError as why:
        raise LoadError(f"--{name}: {why}") from None
