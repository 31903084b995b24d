"""Traces in Mooncake's format: JSON lines of ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``.

Source of the format: Mooncake (Qin et al., FAST 2025) and its FAST25-release traces. ``hash_ids`` name the prompt's blocks of
512 tokens, the last one partial; an id stands for its block *and all before it*, so equal ids are equal prefixes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from pdbench.load.errors import LoadError
from pdbench.load.prompts import Piece
from pdbench.reading import json_of

_FORMAT = '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}'
#: tokens of a block of ``hash_ids``
BLOCK = 512


@dataclass(frozen=True)
class Row:
    """One request of a trace: arrival in seconds after the first one, lengths in tokens, ids of its blocks."""

    arrival_s: float
    isl: int
    osl: int
    blocks: Sequence[int] = ()

    def pieces(self, name: str, serial: int, scale: float) -> tuple[Piece, ...]:
        """Return the prompt as pieces: prompts share exactly the tokens of the blocks that they share.

        Block k of a scaled prompt reaches from round(512 k scale) to round(512 (k + 1) scale), so that a block lies in the
        same place in all prompts. A row without ``hash_ids`` shares nothing: it is one piece called ``name``.
        """
        if not self.blocks:
            return (Piece(name, self.isl, serial=serial),)
        found = []
        start = 0
        for k, block in enumerate(self.blocks):
            end = min(self.isl, round(BLOCK * (k + 1) * scale))
            if end > start:
                found.append(Piece(f"block/{block}", end - start))
            start = end
        if start < self.isl:  # all blocks scaled to nothing, and a prompt has at least 1 token
            found.append(Piece(name, self.isl - start))
        return tuple(found)


@dataclass(frozen=True)
class Scaling:
    """How a trace of a large model's users is fitted to a small model's context.

    Lengths are multiplied by ``length`` and rounded, then cut at ``max_isl`` and ``max_osl`` (None: no cut), and are
    never below 1 token. Lengths that are drawn are only cut.
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

    Raise LoadError when the file cannot be read, a line is not of the format, time runs backwards, or the trace is
    shorter than ``count``.
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
                timestamp, isl, osl, blocks = _fields(line, f"{path}, line {number}")
                start = timestamp if start is None else start
                arrival = (timestamp - start) / 1000
                if arrival < last:
                    raise LoadError(f"{path}, line {number}: its timestamp is before that of the line above it")
                last = arrival
                rows.append(Row(arrival, scaling.isl(isl), scaling.osl(osl), blocks))
    except OSError as why:
        raise LoadError(f"cannot read the trace {path}: {why.strerror or why}") from None
    except UnicodeDecodeError:
        raise LoadError(f"{path} is no text file; a trace has lines such as {_FORMAT}") from None
    if not rows:
        raise LoadError(f"{path} holds no request; a trace has lines such as {_FORMAT}")
    if count is not None and len(rows) < count:
        raise LoadError(f"{path} holds {len(rows)} requests, fewer than --num-requests {count}")
    return rows


def _fields(line: str, where: str) -> tuple[float, int, int, Sequence[int]]:
    try:
        row = json_of(line)
        timestamp, isl, osl, blocks = row["timestamp"], row["input_length"], row["output_length"], row.get("hash_ids") or []
    except (ValueError, TypeError, KeyError, AttributeError):
        raise LoadError(f"{where}: not a line of a Mooncake trace, such as {_FORMAT}") from None
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (isl, osl))
    if not whole or isinstance(timestamp, bool) or not isinstance(timestamp, (int, float)) or not isfinite(timestamp):
        raise LoadError(f"{where}: timestamp must be a number of ms, the lengths whole numbers from 0 up")
    try:
        ids = array("q", blocks)
    except (TypeError, OverflowError):
        raise LoadError(f"{where}: hash_ids must be whole numbers, one a block of {BLOCK} tokens") from None
    if ids and len(ids) != max(1, -(-isl // BLOCK)):
        raise LoadError(f"{where}: {len(ids)} hash_ids for {isl} tokens; there must be one for every {BLOCK} tokens begun")
    return float(timestamp), isl, osl, ids
