"""The figures that a worker's performance is computed from, read from a YAML profile."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pdbench.reading import brief, yaml_of

TRANSPORTS = ("cuda_ipc", "rdma", "tcp")
#: How a figure may have come to be, best first; the first word of its source says which.
ORIGINS = ("measured", "published", "datasheet", "derived", "chosen")

_T = TypeVar("_T")


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file, the key and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(brief(message))


@dataclass(frozen=True)
class Shape:
    """A model's shape. `kv_heads` and `head_dim` describe GQA; `kv_lora_rank` and `rope_dim` above 0 describe MLA instead.

    `params` are all weights, `active_params` those that one token passes through; `experts` and `experts_per_token` are 0 for
    a dense model. `windowed_layers` of the `layers` look back over `window` tokens only. `weight_bytes` is the mean size of a
    weight, `kv_bytes` that of an element of the KV cache; both in bytes.
    """

    layers: int
    heads: int
    head_dim: int
    kv_heads: int
    params: float
    active_params: float
    weight_bytes: float
    kv_bytes: float
    context_length: int
    kv_lora_rank: int = 0
    rope_dim: int = 0
    experts: int = 0
    experts_per_token: int = 0
    windowed_layers: int = 0
    window: int = 0


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in 1e9 bytes, memory bandwidth in 1e9 bytes/s, dense 16-bit compute in 1e12 FLOP/s."""

    memory_gb: float
    bandwidth_gb_per_s: float
    tflops: float


@dataclass(frozen=True)
class Engine:
    """How well an engine uses a GPU, and its limits. Units are in the names; efficiencies are shares of the GPU's peak.

    `request_ms`: what a request spends outside of scheduler and GPU (router, HTTP, tokenizer, sockets), which keeps nobody busy;
    in virtual time alone, as emulated workers have real ones before them.
    """

    compute_efficiency: float
    bandwidth_efficiency: float
    tp_efficiency: float
    prefill_overhead_ms: float
    decode_overhead_ms: float
    decode_us_per_request: float
    frontend_us_per_token: float
    frontend_us_per_request: float
    mem_fraction: float
    chunked_prefill_tokens: int
    max_running_requests: int
    reserved_decode_tokens: int
    startup_s: float
    bootstrap_attempts: int
    bootstrap_interval_s: float
    request_ms: float = 0


@dataclass(frozen=True)
class Transport:
    """One way for the KV cache: bandwidth in 1e9 bytes/s, latency, and what the first transfer of a pair takes in addition."""

    bandwidth_gb_per_s: float
    latency_ms: float
    setup_ms: float


@dataclass(frozen=True)
class Profile:
    """One worker. `sources` says of every figure, by its dotted name, where it comes from."""

    name: str
    description: str
    model: Shape
    gpu: Gpu
    engine: Engine
    transports: dict[str, Transport]
    sources: dict[str, str]

    @property
    def measured_share(self) -> float:
        """Return the share of the figures of engine and transports that were measured, or derived from what was."""
        own = [source for name, source in self.sources.items() if name.startswith(("engine.", "transports."))]
        return sum(source.startswith(("measured", "derived")) for source in own) / len(own)


_SHARES = {"compute_efficiency", "bandwidth_efficiency", "tp_efficiency", "mem_fraction"}
_MAY_BE_ZERO = {
    *("kv_lora_rank", "rope_dim", "experts", "experts_per_token", "windowed_layers", "window", "prefill_overhead_ms"),
    *("decode_overhead_ms", "decode_us_per_request", "frontend_us_per_token", "frontend_us_per_request", "latency_ms"),
    *("request_ms", "setup_ms", "startup_s", "bootstrap_interval_s", "reserved_decode_tokens"),
}


def shipped() -> list[str]:
    """Return the names of the profiles that come with the package."""
    folder = resources.files("pdbench.model") / "profiles"
    return sorted(item.name.removesuffix(".yml") for item in folder.iterdir() if item.name.endswith(".yml"))


def load(name_or_file: str) -> Profile:
    """Read a shipped profile by its name, or any file by its path. Raises ProfileError."""
    if name_or_file in shipped():
        source = f"profile {name_or_file}"
        text = (resources.files("pdbench.model") / "profiles" / f"{name_or_file}.yml").read_text("utf-8")
    else:
        source = name_or_file
        try:
            text = Path(name_or_file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else "not a text file"
            close = difflib.get_close_matches(name_or_file, shipped(), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            message = f"no profile {name_or_file!r}: {reason}; give a file, or one of: {', '.join(shipped())}{hint}"
            raise ProfileError(message) from None
    return parse(text, source, Path(name_or_file).name.removesuffix(".yml"))


def parse(text: str, source: str, name: str = "") -> Profile:
    """Turn the text of a profile into a Profile; `source` names it in errors. Raises ProfileError."""
    try:
        data = yaml_of(text)
    except ValueError as problem:
        raise ProfileError(f"{source}: not YAML: {problem}") from None
    _check_keys(data, ["description", "model", "gpu", "engine", "transports"], [], source, "")
    if not isinstance(data["description"], str):
        raise ProfileError(f"{source}: description must be text, not {data['description']!r}")
    sources: dict[str, str] = {}
    ways = data["transports"]
    _check_keys(ways, list(TRANSPORTS), [], source, "transports.")
    profile = Profile(
        name=name,
        description=data["description"],
        model=_figures(Shape, data["model"], source, "model.", sources),
        gpu=_figures(Gpu, data["gpu"], source, "gpu.", sources),
        engine=_figures(Engine, data["engine"], source, "engine.", sources),
        transports={way: _figures(Transport, ways[way], source, f"transports.{way}.", sources) for way in TRANSPORTS},
        sources=sources,
    )
    _check_shape(profile.model, source)
    return profile


def _check_shape(shape: Shape, source: str) -> None:
    """Refuse figures that contradict each other."""
    rules = [
        (shape.active_params <= shape.params, "model.active_params is larger than model.params"),
        (shape.windowed_layers <= shape.layers, "model.windowed_layers is larger than model.layers"),
        ((shape.windowed_layers > 0) == (shape.window > 0), "model.windowed_layers and model.window go together"),
        (shape.experts_per_token <= shape.experts, "model.experts_per_token is larger than model.experts"),
        ((shape.experts > 0) == (shape.experts_per_token > 0), "model.experts and model.experts_per_token go together"),
        ((shape.kv_lora_rank > 0) == (shape.rope_dim > 0), "model.kv_lora_rank and model.rope_dim go together (MLA)"),
        (shape.kv_heads <= shape.heads, "model.kv_heads is larger than model.heads"),
    ]
    for holds, problem in rules:
        if not holds:
            raise ProfileError(f"{source}: {problem}")


def _figures(kind: type[_T], data: object, source: str, prefix: str, sources: dict[str, str]) -> _T:
    """Read `name: [value, "origin: where from"]` for every field of a dataclass; those with a default may be left out."""
    known: list[Any] = list(fields(kind))  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    optional = [field.name for field in known if field.default == 0]
    rows = _check_keys(data, [field.name for field in known], optional, source, prefix)
    for field in known:
        if field.name not in rows:
            continue
        where, row = f"{source}: {prefix}{field.name}", rows[field.name]
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[1], str)):
            raise ProfileError(f'{where} must be [value, "where it comes from"], not {row!r}')
        if row[1].split(":")[0].split()[0:1] not in [[origin] for origin in ORIGINS]:
            raise ProfileError(f"{where}: its source must begin with one of {', '.join(ORIGINS)}, not {row[1]!r}")
        whole = field.type in ("int", int)
        _check_number(row[0], whole, field.name, where)
        values[field.name] = row[0] if whole else float(row[0])
        sources[f"{prefix}{field.name}"] = row[1]
    return kind(**values)


def _check_number(value: object, whole: bool, name: str, where: str) -> None:
    zero, share = name in _MAY_BE_ZERO, name in _SHARES
    wanted = (
        "a share above 0, at most 1" if share else f"a {'whole ' if whole else ''}number {'of 0 or more' if zero else 'above 0'}"
    )
    good = not isinstance(value, bool) and isinstance(value, int if whole else (int, float)) and math.isfinite(value)
    if not good or not (value >= 0 if zero else value > 0) or (share and value > 1):  # type: ignore[operator]
        raise ProfileError(f"{where} must be {wanted}, not {value!r}")


def _check_keys(data: object, wanted: list[str], optional: list[str], source: str, prefix: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        where = prefix.rstrip(".") or "the profile"
        raise ProfileError(f"{source}: {where} must be a mapping with the keys {', '.join(wanted)}")
    for key in data:
        if key not in wanted:
            close = difflib.get_close_matches(str(key), wanted, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(wanted)}"
            raise ProfileError(f"{source}: unknown key {prefix}{key}; {hint}")
    for key in wanted:
        if key not in data and key not in optional:
            raise ProfileError(f"{source}: {prefix}{key} is missing")
    return data
