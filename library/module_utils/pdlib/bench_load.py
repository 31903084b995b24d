"""The load of a benchmark run: from ``bench_*`` variables to what `pdbench run` takes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from .errors import UserError, did_you_mean

#: Files of the controller that go into the run's folder: variable -> option, name there.
_FILES = {
    "bench_trace": ("trace", "trace.jsonl"),
    "bench_dataset": ("dataset", "dataset.jsonl"),
    "bench_tokenizer": ("tokenizer", "tokenizer.json"),
}
#: They go to the client inside a module's arguments.
_MOST_BYTES = 64_000_000
_PACES = ("concurrency", "request_rate", "batch", "time_scale", "stages")
#: What `bench_load` may hold: the options of `pdbench run` that describe a load, but those that name files, and three more.
LOAD_KEYS = (
    *("concurrency", "request_rate", "batch", "arrival", "num_requests", "duration", "isl", "osl", "max_isl", "max_osl"),
    *("prefix_len", "warmup", "seed", "time_scale", "length_scale", "share_prefixes", "prompt", "token_ids"),
    *("stages", "conversation", "prefix_groups"),
)
#: Tokens of a prompt and of an answer whose length a file says; requests of a load point that is as long as a file.
_SOME_PROMPT, _SOME_TOKENS, _SOME_REQUESTS = 16_000, 1000, 10_000
_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"
_ARRIVAL = re.compile(rf"poisson|constant|gamma:{_NUMBER}", re.ASCII)


def longest(text: str) -> int:
    """Return about the longest length that a spelling of `pdbench run --isl` means; raise ValueError for anything else.

    Of distributions without an end: two standard deviations above the mean (of the logarithm, where it is log-normal).
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 and "@" not in text:
        return _longest(parts[0])
    found = []
    for part in parts:
        body, _, weight = part.rpartition("@")
        if not re.fullmatch(_NUMBER, weight, re.ASCII) or float(weight) <= 0:
            raise ValueError(text)
        found.append(_longest(body))
    return max(found)


def _longest(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text, re.ASCII)
    if match and 1 <= int(match[1]) <= int(match[2] or match[1]):
        return int(match[2] or match[1])
    match = re.fullmatch(rf"(normal|lognormal):{_NUMBER}:{_NUMBER}", text, re.ASCII)
    if match and float(match[2]) >= 1:
        mean, spread = float(match[2]), float(match[3])
        if match[1] == "normal":
            return math.ceil(mean + 2 * spread)
        if spread <= 5:
            return math.ceil(mean * math.exp(2 * spread - spread**2 / 2))
    if re.fullmatch(r"file:[^@,]+", text):
        return _SOME_TOKENS
    raise ValueError(text)


class Point(NamedTuple):
    """A load point: requests in flight or requests a second, and how many requests at most."""

    concurrency: Optional[int]
    rate: Optional[float]
    requests: int


def files(cluster: Mapping[str, Any], root: str) -> Dict[str, str]:
    """Return the files that the load needs: name in the run's folder -> path on the controller; raise UserError."""
    found = {}
    for variable, (_, name) in _FILES.items():
        if cluster[variable]:
            path = Path(root) / cluster[variable]
            # A tokenizer may be named by the model's folder.
            found[name] = _readable(variable, cluster[variable], path / name if path.is_dir() else path)
    for variable in ("bench_input_len", "bench_output_len"):
        for place, part in enumerate(re.findall(r"file:([^@,]+)", cluster[variable])):
            found[_lengths_file(variable, place)] = _readable(variable, part, Path(root) / part)
    return found


def _readable(variable: str, value: str, path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{variable}={value}: there is no such file on the controller")
    if path.stat().st_size > _MOST_BYTES:
        most = f"{_MOST_BYTES // 1_000_000} MB"
        raise UserError(f"{variable}={value}: the file has more than {most}; keep the lines that the run needs")
    return str(path)


def _lengths_file(variable: str, place: int) -> str:
    return f"{variable}-{place}.txt"


def points(cluster: Mapping[str, Any]) -> List[Point]:
    """Return the load points as far as they can be known here; raise UserError for what cannot be right."""
    pace, values = _pace(cluster)
    if pace == "stages":
        return [point for stage in values for point in _staged(cluster, stage)]
    return _points(pace, values, _end(cluster))


def _end(cluster: Mapping[str, Any]) -> Tuple[str, Any]:
    for name in ("duration", "num_requests"):
        if cluster["bench_load"].get(name) is not None:
            return name, cluster["bench_load"][name]
    if cluster["bench_duration"] is not None:
        return "duration", cluster["bench_duration"]
    return "num_requests", cluster["bench_num_requests"]


def _points(pace: str, values: List[Any], end: Tuple[str, Any]) -> List[Point]:
    name, amount = end
    if name == "duration" and pace in ("concurrency", "batch"):
        raise UserError(
            "bench_duration goes with bench_request_rate or bench_time_scale: a closed loop ends by bench_num_requests"
        )
    if pace == "time_scale":
        return [Point(None, None, int(amount) if name == "num_requests" else _SOME_REQUESTS)]
    if pace == "batch":
        return [Point(int(value), None, int(value)) for value in values]
    if pace == "concurrency":
        return [Point(int(value), None, int(amount)) for value in values]
    counts = [int(amount) if name == "num_requests" else math.ceil(float(amount) * float(value)) for value in values]
    return [Point(None, float(value), count) for value, count in zip(values, counts)]


def _staged(cluster: Mapping[str, Any], stage: Any) -> List[Point]:
    """Return a stage's load point; what is wrong with it `pdbench run` says better."""
    if not isinstance(stage, Mapping):
        raise UserError("bench_load: stages must be a list such as [{concurrency: 32, num_requests: 200}]")
    pace = next((name for name in ("concurrency", "batch", "request_rate") if name in stage), "")
    if not pace:
        raise UserError(f"bench_load: stage {dict(stage)}: say concurrency, request_rate or batch")
    own = next(((name, stage[name]) for name in ("duration", "num_requests") if name in stage), None)
    try:
        fastest = max(float(stage[pace]), float(stage.get("to", 0)))
        return _points(pace, [fastest], own or _end(cluster))
    except (TypeError, ValueError):
        raise UserError(f"bench_load: stage {dict(stage)}: expected numbers") from None


def _pace(cluster: Mapping[str, Any]) -> Tuple[str, List[Any]]:
    """Return how the load is paced, and its values; `bench_load` comes before the other variables."""
    load = cluster["bench_load"]
    for key in load:
        if key not in LOAD_KEYS:
            named_by = "; files have variables: bench_trace, bench_dataset, bench_tokenizer"
            more = named_by if key in ("trace", "dataset", "tokenizer") else ""
            raise UserError(f"bench_load: {key!r} is no key{did_you_mean(key, LOAD_KEYS)}{more}; keys: {', '.join(LOAD_KEYS)}")
    named = [pace for pace in _PACES if load.get(pace) is not None]
    others = [pace for pace in ("request_rate", "batch", "time_scale") if cluster[f"bench_{pace}"]]
    if len(named) > 1 or (not named and len(others) > 1):
        ways = [f"bench_load: {pace}" for pace in named] if named else [f"bench_{pace}" for pace in others]
        raise UserError(f"{' and '.join(ways)} are ways to say how much load; give one")
    pace = (named or others or ["concurrency"])[0]
    value = load[pace] if named else cluster[f"bench_{pace}"]
    values = value if isinstance(value, list) else [value]
    if pace == "request_rate":
        for rate in values:
            _check_rate(rate)
    return pace, values


def _check_rate(rate: Any) -> None:
    try:
        good = 0 < float(rate) < math.inf
    except (TypeError, ValueError):
        good = False
    if not good:
        raise UserError(f"bench_request_rate={rate!r}: expected numbers above 0, such as 4 or 4,8,16 (requests a second)")


def tokens(cluster: Mapping[str, Any]) -> Tuple[int, int]:
    """Return about how long a prompt and an answer may be."""
    found = []
    for key, variable, some in (("isl", "bench_input_len", _SOME_PROMPT), ("osl", "bench_output_len", _SOME_TOKENS)):
        own = cluster["bench_load"].get(key)
        try:
            drawn = longest(cluster[variable] if own is None else str(own))
        except ValueError:
            raise UserError(f"bench_load: {key}: {own!r} is no length, such as 512 or 256-512") from None
        free = cluster["bench_trace"] or (cluster["bench_dataset"] and own is None)
        limit = cluster["bench_load"].get(f"max_{key}") or cluster[variable.replace("bench_", "bench_max_")]
        found.append(min(some if free else drawn, int(limit) if limit else 10**9))
    return found[0], found[1]


def arguments(cluster: Mapping[str, Any], named: Mapping[str, str]) -> List[str]:
    """Return `pdbench run`'s arguments for the load.

    ``named``: files of the run's folder, as `files` has them; `bench_load` is there as load.yml, and comes first.
    """
    pace, values = _pace(cluster)
    said: Dict[str, Any] = {}
    if pace != "stages":
        said[pace] = ",".join(str(value) for value in values)
    if cluster["bench_duration"] is not None:
        said["duration"] = cluster["bench_duration"]
    elif pace != "batch":
        said["num_requests"] = cluster["bench_num_requests"]
    if pace == "request_rate":
        if not _ARRIVAL.fullmatch(cluster["bench_arrival"]):
            raise UserError(
                f"bench_arrival={cluster['bench_arrival']}: expected poisson, constant, or gamma:B, such as gamma:0.5"
            )
        said["arrival"] = cluster["bench_arrival"]
    for option, name in _FILES.values():
        if name in named:
            said[option] = f"{{dir}}/{name}"
    if "trace" in said:
        said["length_scale"] = cluster["bench_length_scale"]
    elif "dataset" not in said:
        said["isl"] = _with_files(cluster, "bench_input_len")
        said["osl"] = _with_files(cluster, "bench_output_len")
    more = {"max_isl": "bench_max_input_len", "max_osl": "bench_max_output_len", "prefix_len": "bench_prefix_len"}
    for option, variable in more.items():
        if cluster[variable]:
            said[option] = cluster[variable]
    if cluster["bench_warmup"] is not None:
        said["warmup"] = cluster["bench_warmup"]
    said["seed"] = cluster["bench_seed"]
    for variable in ("bench_time_scale", "bench_share_prefixes"):
        if cluster[variable] and "trace" not in said:
            raise UserError(f"{variable} goes with bench_trace")
    load = cluster["bench_load"]
    ends = {"num_requests", "duration"} if {"num_requests", "duration"} & set(load) else set()
    items: List[str] = []
    for key, value in said.items():
        if key not in load and key not in ends:
            items += [f"--{key.replace('_', '-')}", str(value)]
    items += ["--share-prefixes"] if cluster["bench_share_prefixes"] else []
    return items + (["--load", "{dir}/load.yml"] if load else [])


def _with_files(cluster: Mapping[str, Any], variable: str) -> str:
    """Return a length whose files are those in the run's folder."""
    places = iter(range(len(cluster[variable])))
    return re.sub(r"file:[^@,]+", lambda _: f"file:{{dir}}/{_lengths_file(variable, next(places))}", cluster[variable])
