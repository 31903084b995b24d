"""Traces in Mooncake's format: JSON lines of ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pdbench.load.errors import LoadError

_FORMAT = '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}'


@dataclass(frozen=True)
class Row:
    """One request of a trace: arrival in seconds after the first one, lengths in tokens."""

    arrival_s: float
    isl: int
    osl: int


@dataclass(frozen=True)
class Scaling:
    """How a trace of a large model's users is fitted to a small model's context.

    Lengths are multiplied by ``length`` and rounded, then cut at ``max_isl`` and ``max_osl`` (None: no cut), and are
    never below 1 token.
    """

    length: float = 1.0
    max_isl: int | None = None
    max_osl: int | None = None

    def isl(self, tokens: int) -> int:
        """Return the prompt length to send for one in the trace."""
        return self._fit(tokens, self.max_isl)

    def osl(self, tokens: int) -> int:
        """Return the output length to ask for one in the trace."""
        return self._fit(tokens, self.max_osl)

    def _fit(self, tokens: int, limit: int | None) -> int:
        scaled = max(1, round(tokens * self.length))
        return scaled if limit is None else min(scaled, limit)


def read_trace(path: Path, scaling: Scaling, count: int | None = None) -> list[Row]:
    """Return the first ``count`` requests of a trace (all, when None), in the file's order.

    ``hash_ids`` name shared prefixes; they are not replayed, every prompt is new. Raise LoadError when the file cannot
    be read, a line is not of the format, time runs backwards, or the trace is shorter than ``count``.
    """
    rows: list[Row] = []
    start: float | None = None
    last = 0.0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if count is not None and len(rows) == count:
                    break
                if not line.strip():
                    continue
                timestamp, isl, osl = _fields(line, f"{path}, line {number}")
                start = timestamp if start is None else start
                arrival = (timestamp - start) / 1000
                if arrival < last:
                    raise LoadError(f"{path}, line {number}: its timestamp is before that of the line above it")
                last = arrival
                rows.append(Row(arrival, scaling.isl(isl), scaling.osl(osl)))
    except OSError as why:
        raise LoadError(f"cannot read the trace {path}: {why.strerror or why}") from None
    except UnicodeDecodeError:
        raise LoadError(f"{path} is no text file; a trace has lines such as {_FORMAT}") from None
    if not rows:
        raise LoadError(f"{path} holds no request; a trace has lines such as {_FORMAT}")
    if count is not None and len(rows) < count:
        raise LoadError(f"{path} holds {len(rows)} requests, fewer than --num-requests {count}")
    return rows


def _fields(line: str, where: str) -> tuple[float, int, int]:
    try:
        row = json.loads(line)
        timestamp, isl, osl = row["timestamp"], row["input_length"], row["output_length"]
    except (ValueError, TypeError, KeyError):
        raise LoadError(f"{where}: not a line of a Mooncake trace, such as {_FORMAT}") from None
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (isl, osl))
    if not whole or isinstance(timestamp, bool) or not isinstance(timestamp, (int, float)):
        raise LoadError(f"{where}: timestamp must be a number of ms, the lengths whole numbers from 0 up")
    return float(timestamp), isl, osl
