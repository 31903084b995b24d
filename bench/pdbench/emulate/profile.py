"""The figures that an emulated worker is made of, read from a YAML profile."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

TRANSPORTS = ("cuda_ipc", "rdma", "tcp")


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file, the key and what would be right."""


@dataclass(frozen=True)
class Transport:
    """One way for the KV cache: bandwidth in 1e9 bytes/s, latency in ms."""

    bandwidth_gb_per_s: float
    latency_ms: float


@dataclass(frozen=True)
class Profile:
    """One emulated worker. Units are in the names; `profiles/tiny.yml` explains every key."""

    description: str
    prefill_tokens_per_s: float
    prefill_overhead_ms: float
    decode_step_ms: float
    kv_bytes_per_token: int
    transports: dict[str, Transport]
    startup_s: float
    max_running_requests: int
    context_length: int
    bootstrap_attempts: int
    bootstrap_interval_s: float


@dataclass(frozen=True)
class _Number:
    whole: bool
    positive: bool

    @property
    def wanted(self) -> str:
        return f"a {'whole ' if self.whole else ''}number {'above 0' if self.positive else 'of 0 or more'}"

    def accepts(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        return math.isfinite(value) and (value > 0 if self.positive else value >= 0)


_NUMBERS = {
    "prefill_tokens_per_s": _Number(whole=False, positive=True),
    "prefill_overhead_ms": _Number(whole=False, positive=False),
    "decode_step_ms": _Number(whole=False, positive=True),
    "kv_bytes_per_token": _Number(whole=True, positive=True),
    "startup_s": _Number(whole=False, positive=False),
    "max_running_requests": _Number(whole=True, positive=True),
    "context_length": _Number(whole=True, positive=True),
    "bootstrap_attempts": _Number(whole=True, positive=True),
    "bootstrap_interval_s": _Number(whole=False, positive=False),
}
_TRANSPORT_NUMBERS = {
    "bandwidth_gb_per_s": _Number(whole=False, positive=True),
    "latency_ms": _Number(whole=False, positive=False),
}


def shipped() -> list[str]:
    """Return the names of the profiles that come with the package."""
    folder = resources.files("pdbench.emulate") / "profiles"
    return sorted(item.name.removesuffix(".yml") for item in folder.iterdir() if item.name.endswith(".yml"))


def load(name_or_file: str) -> Profile:
    """Read a shipped profile by its name, or any file by its path. Raises ProfileError."""
    if name_or_file in shipped():
        source = f"profile {name_or_file}"
        text = (resources.files("pdbench.emulate") / "profiles" / f"{name_or_file}.yml").read_text("utf-8")
    else:
        source = name_or_file
        try:
            text = Path(name_or_file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else "not a text file"
            message = f"no profile {name_or_file!r}: {reason}; give a file, or one of: {', '.join(shipped())}"
            raise ProfileError(message) from None
    return parse(text, source)


def parse(text: str, source: str) -> Profile:
    """Turn the text of a profile into a Profile; `source` names it in errors. Raises ProfileError."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise ProfileError(f"{source}: not YAML: {' '.join(str(problem).split())}") from None
    _check_keys(data, ["description", "transports", *_NUMBERS], source, "")
    if not isinstance(data["description"], str):
        raise ProfileError(f"{source}: description must be text, not {data['description']!r}")
    _check_numbers(data, _NUMBERS, source, "")
    ways = data["transports"]
    _check_keys(ways, list(TRANSPORTS), source, "transports.")
    for name in TRANSPORTS:
        _check_keys(ways[name], list(_TRANSPORT_NUMBERS), source, f"transports.{name}.")
        _check_numbers(ways[name], _TRANSPORT_NUMBERS, source, f"transports.{name}.")
    return Profile(**{**data, "transports": {name: Transport(**ways[name]) for name in TRANSPORTS}})


def _check_keys(data: object, wanted: list[str], source: str, prefix: str) -> None:
    if not isinstance(data, dict):
        where = prefix.rstrip(".") or "the profile"
        raise ProfileError(f"{source}: {where} must be a mapping with the keys {', '.join(wanted)}")
    for key in data:
        if key not in wanted:
            close = difflib.get_close_matches(str(key), wanted, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(wanted)}"
            raise ProfileError(f"{source}: unknown key {prefix}{key}; {hint}")
    for key in wanted:
        if key not in data:
            raise ProfileError(f"{source}: {prefix}{key} is missing")


def _check_numbers(data: dict[str, object], numbers: dict[str, _Number], source: str, prefix: str) -> None:
    for key, number in numbers.items():
        if not number.accepts(data[key]):
            raise ProfileError(f"{source}: {prefix}{key} must be {number.wanted}, not {data[key]!r}")
