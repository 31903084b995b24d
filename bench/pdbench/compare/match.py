"""Which rows are compared with which: the same load on both sides, or every configuration with the aggregated baseline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pandas as pd

from pdbench.compare import sides
from pdbench.compare.sides import Side


class Unfit(Exception):
    """The sides cannot be compared as they were given; the message says what to give instead."""


class Refused(Exception):
    """Nothing valid is left to compare; the message names the runs and why they are invalid."""


@dataclass(frozen=True)
class Match:
    """Two configurations at one load, in words and as rows of the tidy table."""

    load: str
    a_name: str
    b_name: str
    a: pd.DataFrame
    b: pd.DataFrame


@dataclass(frozen=True)
class Matches:
    """What is compared, and what is to be said beside it (runs left out, loads without a partner)."""

    found: list[Match]
    remarks: list[str] = field(default_factory=list)


def two(a: Side, b: Side) -> Matches:
    """Match two sides by load; where both hold several configurations, by configuration and load. Raise Unfit, Refused."""
    remarks: list[str] = []
    rows = sides.keyed(pd.concat([a.rows, b.rows.assign(side="B")], ignore_index=True))
    rows = _believed(rows, remarks)
    left, right = (rows[rows["side"] == name] for name in ("A", "B"))
    for side, part in ((a, left), (b, right)):
        if part.empty:
            raise Refused(f"{side.name} has no valid run to compare: {'; '.join(remarks)}")
    many = [name for name, part in (("A", left), ("B", right)) if part["setup"].nunique() > 1]
    names = ["load"]
    if many:
        if set(left["setup"]).isdisjoint(right["setup"]):
            part, side = (left, a) if many[0] == "A" else (right, b)
            several = "; ".join(sides.setup_in_words(rows.iloc[0]) for _, rows in part.groupby("setup", sort=False))
            raise Unfit(f"{side.name} holds several configurations ({several}): choose one, such as {side.name}:ratio=...")
        names.append("setup")
    others = dict(_groups(right, names))
    found = []
    for key, part in _groups(left, names):
        if key in others:
            other = others.pop(key)
            words = [sides.setup_in_words(one.iloc[0]) for one in (part, other)]
            found.append(Match(sides.load_in_words(part.iloc[0]), words[0], words[1], part, other))
        else:
            remarks.append(f"only A has {sides.load_in_words(part.iloc[0])}")
    remarks += [f"only B has {sides.load_in_words(other.iloc[0])}" for other in others.values()]
    if not found:
        raise Unfit(f"no load is on both sides, so there is nothing to compare: {'; '.join(remarks)}")
    return Matches(found, remarks)


def with_baseline(side: Side) -> Matches:
    """Match every configuration of a sweep with the aggregated one on as many GPUs, load by load. Raise Unfit, Refused.

    Of several such baselines, it is the one that has most of the other variables in common.
    """
    remarks: list[str] = []
    rows = _believed(sides.keyed(side.rows), remarks)
    if rows.empty:
        raise Refused(f"{side.name} has no valid run to compare: {'; '.join(remarks)}")
    whole = rows[(rows["aggregated_workers"] > 0).fillna(False).astype(bool)]
    found = []
    for _, at_load in _groups(rows, ["load"]):
        for _, part in _groups(at_load, ["setup"]):
            first = part.iloc[0]
            if first["setup"] in set(whole["setup"]):
                continue
            candidates = [one for _, one in _groups(whole[whole["load"] == first["load"]], ["setup"]) if _fits(one, part)]
            if not candidates:
                gpus = "an unknown number of" if pd.isna(first["gpus"]) else first["gpus"]
                remarks.append(
                    f"no aggregated baseline on {gpus} GPUs for {sides.setup_in_words(first)} at {sides.load_in_words(first)}"
                )
                continue
            base = max(candidates, key=lambda one: _common(one, part))
            words = [sides.setup_in_words(one.iloc[0]) for one in (base, part)]
            found.append(Match(sides.load_in_words(first), words[0], words[1], base, part))
    if not found:
        raise Unfit(f"{side.name} has nothing to compare with an aggregated baseline: {'; '.join(remarks) or 'no such cell'}")
    return Matches(found, remarks)


def believed(side: Side) -> pd.DataFrame:
    """Return a side's rows without the invalid ones; raise Refused when none is left."""
    remarks: list[str] = []
    rows = _believed(side.rows, remarks)
    if rows.empty:
        raise Refused(f"{side.name} has no valid run: {'; '.join(remarks)}")
    return rows


def _fits(base: pd.DataFrame, part: pd.DataFrame) -> bool:
    one, other = base.iloc[0], part.iloc[0]
    return bool(pd.notna(other["gpus"]) and one["gpus"] == other["gpus"] and one["model"] == other["model"])


def _common(base: pd.DataFrame, part: pd.DataFrame) -> int:
    one, other = (sides.own_variables(rows.iloc[0]["variables"]) for rows in (base, part))
    same = sum(bool(one[name] == other[name]) for name in one.keys() & other.keys())
    return same + sum(bool(base.iloc[0][name] == part.iloc[0][name]) for name in ("engine", "engine_version", "router_policy"))


def _groups(rows: pd.DataFrame, names: list[str]) -> Iterator[tuple[tuple[object, ...], pd.DataFrame]]:
    """Yield the rows that have these columns in common, in the order of the first of each."""
    order: dict[tuple[object, ...], list[object]] = {}
    for at, key in zip(rows.index, zip(*(rows[name] for name in names), strict=True), strict=True):
        order.setdefault(key, []).append(at)
    for key, places in order.items():
        yield key, rows.loc[places]


def _believed(rows: pd.DataFrame, remarks: list[str]) -> pd.DataFrame:
    """Return the rows without invalid ones, each named with its reason; say which were never judged."""
    wrong = rows["valid"].eq(False).fillna(False).astype(bool)
    for row in rows[wrong].drop_duplicates(["run", "cell", "repeat", "point"]).to_dict("records"):
        point = f", {sides.load_in_words(row)}" if pd.notna(row["isl"]) else ""
        remarks.append(f"left out: {row['run'] or row['cell']}{point} is invalid: {row['invalid_reasons'] or 'no reason given'}")
    unknown = rows[rows["valid"].isna()]
    for source, part in unknown.groupby("source", sort=False):
        names = _few(dict.fromkeys(row["run"] or row["cell"] for row in part.to_dict("records")))
        why = "they were imported" if str(source).startswith("import:") else "`pdbench gate` was not run on them"
        remarks.append(f"nobody judged whether these are to be believed, because {why}: {names}")
    return rows[~wrong]


def _few(names: Iterable[object]) -> str:
    listed = list(map(str, names))
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
