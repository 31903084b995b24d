"""One record a request: its fields, its line in ``requests.jsonl`` and its row in ``requests.parquet``.

``requests.jsonl`` is written while the run goes on, so that a crash loses next to nothing; ``requests.parquet`` is made
of it at the end. Both hold the same fields, described in docs/architecture.md.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    import pyarrow

WARMUP = "warmup"
MEASURE = "measure"
NOT_REPORTED = -1


@dataclass(slots=True)
class Record:
    """What happened to one request.

    Times are float seconds on the client's monotonic clock, relative to the start of the request's load point; NaN
    stands for "did not happen". Token counts are as the server reports them, -1 where it does not. A request of a
    conversation has the index of that one's first request, and its turn from 1 up; others -1 and 0.
    """

    point: int
    index: int
    phase: str
    prompt_tokens_asked: int
    output_tokens_asked: int
    scheduled_s: float = math.nan
    sent_s: float = math.nan
    first_s: float = math.nan
    end_s: float = math.nan
    chunk_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = NOT_REPORTED
    output_tokens: int = NOT_REPORTED
    cached_tokens: int = NOT_REPORTED
    status: int = 0
    finish_reason: str = ""
    ok: bool = False
    error: str = ""
    output_sha256: str = ""
    conversation: int = -1
    turn: int = 0

    def to_line(self) -> str:
        """Return the record as one line of JSON, newline included; NaN becomes null."""
        return orjson.dumps({name: getattr(self, name) for name in _NAMES}).decode() + "\n"

    @classmethod
    def from_mapping(cls, row: Mapping[str, object]) -> Record:
        """Build a record from a mapping with its fields; null times become NaN. Raise ValueError otherwise.

        Records made before conversations lack the fields for them.
        """
        if row.keys() != _KEYS and row.keys() != _KEYS - _LATER:
            odd = sorted(_KEYS.symmetric_difference(row))
            raise ValueError(f"not a request record: missing or unknown fields {', '.join(odd)}")
        values = {k: (math.nan if v is None and k.endswith("_s") else v) for k, v in row.items()}
        return cls(**values)  # type: ignore[arg-type]


_NAMES = tuple(f.name for f in fields(Record))
_TYPES = {f.name: str(f.type) for f in fields(Record)}
_KEYS = frozenset(_NAMES)
#: types of the fields of records that were found to be right
_SOUND: set[tuple[type, ...]] = set()
_LATER = {"conversation", "turn"}


def read_jsonl(path: Path) -> Iterator[Record]:
    """Yield the records of ``requests.jsonl``.

    A last line without its newline is what a killed run leaves behind: it is dropped. Any other line that is no record
    raises ValueError with its number.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            try:
                yield _typed(Record.from_mapping(orjson.loads(line)))
            except (ValueError, TypeError, AttributeError) as why:
                raise ValueError(f"{path}, line {number}: {why}") from None


def _typed(record: Record) -> Record:
    """Return the record; raise ValueError when a field holds what the run's columns cannot."""
    kinds = tuple(type(getattr(record, name)) for name in _NAMES)
    if kinds not in _SOUND:
        for name, kind in zip(_NAMES, kinds, strict=True):
            wanted = {"float": (float, int), "int": (int,), "str": (str,), "bool": (bool,)}.get(_TYPES[name], (list,))
            if kind not in wanted:
                raise ValueError(f"{name} is {getattr(record, name)!r}")
        _SOUND.add(kinds)
    return record


def schema() -> pyarrow.Schema:
    """Return the columns of ``requests.parquet``, in their order."""
    import pyarrow as pa

    kinds = {
        **dict.fromkeys(("scheduled_s", "sent_s", "first_s", "end_s"), pa.float64()),
        **dict.fromkeys(("phase", "finish_reason", "error", "output_sha256"), pa.string()),
        "chunk_s": pa.list_(pa.float64()),
        "chunk_tokens": pa.list_(pa.int32()),
        "ok": pa.bool_(),
    }
    return pa.schema([(f.name, kinds.get(f.name, pa.int32())) for f in fields(Record)])


def write_parquet(path: Path, records: Iterable[Record]) -> None:
    """Write ``requests.parquet`` at once: a reader sees the old file or the whole new one. Raise OSError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = sorted(records, key=lambda r: (r.point, r.phase != WARMUP, r.index))
    table = pa.Table.from_arrays([_column(field, [getattr(r, field.name) for r in rows]) for field in schema()], schema=schema())
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _column(field: pyarrow.Field, values: list[Any]) -> pyarrow.Array:
    """Return a column; lists go in as one run of numbers, which takes a fiftieth of the time of one object after another."""
    import numpy as np
    import pyarrow as pa

    if not pa.types.is_list(field.type):
        return pa.array(values, field.type, from_pandas=False)
    flat = pa.array(np.fromiter(itertools.chain.from_iterable(values), field.type.value_type.to_pandas_dtype()))
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), flat)


def read_parquet(path: Path) -> list[Record]:
    """Return the records of ``requests.parquet``; raise OSError or ValueError when it is not one."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    kinds = {column.name: column.type for column in table.schema}
    for column in schema():
        if kinds.get(column.name, column.type) != column.type:
            raise ValueError(f"the column {column.name} is {kinds[column.name]}, not {column.type}")
    return [Record.from_mapping(row) for row in table.to_pylist()]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it there when the body succeeds: never a half-written file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON at once; NaN is refused, because it is no JSON. Raise OSError."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
