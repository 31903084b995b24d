"""What the sending processes hand to the digesting one: finished exchanges, appended to files in the run's folder.

A file and not a pipe: a pipe fills up and would hold the sender, and what a killed run leaves in a file can still be read.
Each sender writes segments ``.spool-SENDER-NUMBER`` and begins a new one every 64 MB; the reader removes those it is done
with, so that the disk holds what has not been digested, however long the run.
"""

from __future__ import annotations

import math
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson

from pdbench.records import Record
from pdbench.run.digest import Raw
from pdbench.run.exchange import Exchange

_SEGMENT_BYTES = 64 << 20
_HEAD = struct.Struct("=III")  # bytes of: meta (JSON), of all stamps and lengths, of the body
_PREFIX = ".spool-"


class Writer:
    """Appends one sender's exchanges; `OSError` when the disk is full."""

    def __init__(self, folder: Path, sender: int) -> None:
        """Begin the first segment."""
        self._folder, self._sender = folder, sender
        self._number = self._size = 0
        self.count = 0
        self._file = self._next()

    def write(self, record: Record, start: float, api: str, exchange: Exchange) -> None:
        """Append a finished exchange and forget its body."""
        body = b"".join(exchange.parts)
        asked = (record.point, record.index, record.phase, record.prompt_tokens_asked, record.output_tokens_asked)
        talk = (record.conversation, record.turn)
        came = (exchange.wanted, exchange.sent, start, api, exchange.status, exchange.content_type, exchange.error)
        meta = orjson.dumps((asked, talk, came))
        reads = exchange.stamps.tobytes() + exchange.lengths.tobytes()
        frame = b"".join((_HEAD.pack(len(meta), len(reads), len(body)), meta, reads, body))
        exchange.parts.clear()
        if self._size and self._size + len(frame) > _SEGMENT_BYTES:
            os.close(self._file)
            self._number, self._size = self._number + 1, 0
            self._file = self._next()
        rest = memoryview(frame)
        while rest:  # a write that is cut short says why with the next
            rest = rest[os.write(self._file, rest) :]
        self._size += len(frame)
        self.count += 1

    def close(self) -> None:
        """Close the segment."""
        os.close(self._file)

    def _next(self) -> int:
        path = self._folder / f"{_PREFIX}{self._sender}-{self._number}"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)


class Reader:
    """Reads one sender's exchanges while they are written."""

    def __init__(self, folder: Path, sender: int, number: int = 0) -> None:
        """Start at a segment's beginning."""
        self._folder, self._sender, self._number, self._at = folder, sender, number, 0
        self.count = 0

    def read(self) -> Iterator[Raw]:
        """Yield every whole exchange that stands there and was not yielded before."""
        while True:
            path = self._folder / f"{_PREFIX}{self._sender}-{self._number}"
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return
            # Looked for before this one is read to its end: what is written last into it is then seen.
            more = path.with_name(f"{_PREFIX}{self._sender}-{self._number + 1}").exists()
            with file:
                file.seek(self._at)
                while (raw := _frame(file.read)) is not None:
                    self._at = file.tell()
                    self.count += 1
                    yield raw
            if not more:
                return
            path.unlink()
            self._number, self._at = self._number + 1, 0


def leftover(folder: Path) -> Iterator[Raw]:
    """Yield what a killed run's senders wrote last; some of it may stand in the journal already."""
    first: dict[int, int] = {}
    for path in folder.glob(f"{_PREFIX}*"):
        name, _, segment = path.name.removeprefix(_PREFIX).partition("-")
        if name.isdecimal() and segment.isdecimal():
            first[int(name)] = min(int(segment), first.get(int(name), int(segment)))
    for sender, number in sorted(first.items()):
        yield from Reader(folder, sender, number).read()


def clear(folder: Path) -> None:
    """Remove every segment."""
    for path in folder.glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)


def _frame(read: Callable[[int], bytes]) -> Raw | None:
    head = read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    meta_size, reads_size, body_size = _HEAD.unpack(head)
    rest = read(meta_size + reads_size + body_size)
    if len(rest) < meta_size + reads_size + body_size:
        return None
    asked, talk, (wanted, sent, start, api, status, kind, error) = orjson.loads(rest[:meta_size])
    stamps, lengths = array("d"), array("L")
    count = reads_size // (stamps.itemsize + lengths.itemsize)
    lengths_at = meta_size + count * stamps.itemsize
    stamps.frombytes(rest[meta_size:lengths_at])
    lengths.frombytes(rest[lengths_at : meta_size + reads_size])
    record = Record(*asked)
    record.scheduled_s, record.sent_s = wanted - start, math.nan if sent is None else sent - start
    record.conversation, record.turn = talk
    return Raw(record, start, api, status, kind, stamps, lengths, rest[meta_size + reads_size :], error)
