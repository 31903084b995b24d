"""Server-sent events, cut out of a response after it has ended.

The client keeps every read with the time it arrived and does nothing else while the stream runs. Here the reads are
put together again and events are found in the whole, so where the network happened to cut (between two events, inside
a UTF-8 character, between CR and LF) cannot change what is read; it only decides which read completed an event.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its ``event:`` name ("" when unnamed), its data, and when and in which read its last byte came.

    ``whole`` is False for what is left at the end of a stream without the blank line that ends an event.
    """

    name: str
    data: bytes
    time_s: float
    read: int
    whole: bool = True


def events(reads: Sequence[tuple[float, bytes]]) -> list[Event]:
    """Return the events in ``reads``, pairs of arrival time (seconds) and bytes, in order.

    Comments and fields other than ``event`` and ``data`` are skipped; an event without data is none (WHATWG HTML,
    section 9.2.6).
    """
    body = b"".join(part for _, part in reads)
    ends = list(itertools.accumulate(len(part) for _, part in reads))
    found: list[Event] = []
    name, data = b"", list[bytes]()

    def close(upto: int, whole: bool) -> None:
        nonlocal name
        if data:
            read = bisect.bisect_left(ends, upto)
            found.append(Event(name.decode("utf-8", "replace"), b"\n".join(data), reads[read][0], read, whole))
        name = b""
        data.clear()

    start = 0
    for match in _LINE_END.finditer(body):
        line, start = body[start : match.start()], match.end()
        if not line:
            # The blank line is complete with its first byte: a LF that follows a CR adds nothing.
            close(match.start() + 1, whole=True)
        else:
            name = _take(line, name, data)
    if start < len(body):
        name = _take(body[start:], name, data)
    close(len(body), whole=False)
    return found


def _take(line: bytes, name: bytes, data: list[bytes]) -> bytes:
    key, _, value = line.partition(b":")
    value = value.removeprefix(b" ")
    if key == b"data":
        data.append(value)
    return value if key == b"event" else name
