"""What a load point asks for beside concurrency, rate and seed: with these, what makes two of them the same load. Pure.

`of` writes it as one text, the tidy table's column ``asked``. Lengths that are drawn stand there as they were spelled: their
means differ from seed to seed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import PurePath
from typing import Any

from pdbench.reading import json_of

Json = dict[str, Any]
#: names of a point in summary.json, as `pdbench.run.load_points` writes them, and of the run
POINT = (
    *("batch", "request_rate_to", "arrival", "time_scale", "duration", "isl", "osl", "trace", "dataset", "length_scale"),
    *("max_isl", "max_osl", "prefix_len", "prefix_groups", "conversation", "shared_prefix", "num_requests"),
)
_RUN = ("api", "prompt")
#: what needs no words
_USUAL = {"arrival": "poisson", "length_scale": 1.0, "api": "completions", "prompt": "tokens"}
_WORDS = {"batch": "all at once", "isl": "prompts", "osl": "answers"}
#: a run's folder has files under other names than the user gave them
_FILES = {"trace": "bench_trace", "dataset": "bench_dataset", "isl": "bench_input_len", "osl": "bench_output_len"}
#: swept variables that are columns of the tidy table, or differ from repeat to repeat
_COLUMNS = frozenset(
    f"bench_{name}" for name in ("concurrency", "request_rate", "input_len", "output_len", "num_requests", "seed")
)
#: swept variables that stand in ``asked``
_VARIABLES = frozenset(
    f"bench_{name}"
    for name in (
        *("batch", "arrival", "time_scale", "duration", "trace", "dataset", "length_scale", "max_input_len", "max_output_len"),
        *("prefix_len", "share_prefixes", "api"),
    )
)


def of(point: Mapping[str, Any], summary: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return what a point of summary.json asked for; "" where it does not say so."""
    if not point.get("num_requests"):
        return ""
    found = {name: point[name] for name in POINT if point.get(name) not in (None, False)}
    found |= {name: summary[name] for name in _RUN if summary.get(name)}
    if manifest.get("bench_duration") and not {"concurrency", "batch"} & {name for name in point if point[name]}:
        found.setdefault("duration", float(manifest["bench_duration"]))  # older summaries do not say it
    if "duration" in found:
        del found["num_requests"]  # how many arrive in it is drawn
    for name in found.keys() & _FILES.keys():
        text = str(found[name])
        if name in ("trace", "dataset"):
            found[name] = PurePath(str(manifest.get(_FILES[name]) or text)).name
        elif "file:" in text:
            given = str(manifest.get(_FILES[name]))
            found[name] = re.sub(r"file:[^@,]*/", "file:", given if "file:" in given else text)
    return json.dumps(found, sort_keys=True)


def read(text: str | None) -> Json:
    """Return what `of` wrote; {} for a row without it."""
    try:
        found = json_of(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def others(variables: Mapping[str, Any], asked: str | None) -> Json:
    """Return the swept variables of the load that stand nowhere else; of rows without ``asked``, all but those of columns."""
    told = _COLUMNS | _VARIABLES if asked else _COLUMNS
    return {name: value for name, value in sorted(variables.items()) if name.startswith("bench_") and name not in told}


def words(asked: Mapping[str, Any], names: Collection[str] = (), silent: Collection[str] = ()) -> list[str]:
    """Return what a reader must be told of a load; ``names`` are told though they are usual, ``silent`` ones are not."""
    return [
        _in_words(name, asked[name])
        for name in (*POINT, *_RUN)
        if name in asked and name not in silent and (name in names or not _usual(name, asked[name]))
    ]


def plain(length: object) -> bool:
    """Tell whether a length is one number."""
    return str(length).isdigit()


def _usual(name: str, value: object) -> bool:
    return name == "num_requests" or (name in ("isl", "osl") and plain(value)) or value == _USUAL.get(name)


def _in_words(name: str, value: object) -> str:
    if name == "num_requests":
        return f"{value} requests"
    said, value = _WORDS.get(name, name.replace("_", " ")), json.dumps(value, sort_keys=True).strip('"')
    return said if value == "true" else f"{said} {value}"
