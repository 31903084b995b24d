"""From raw reads to a record: done by a process of its own, so that parsing never delays a timestamp."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

from pdbench.records import Record
from pdbench.run.replies import error_text, read_reply
from pdbench.run.sse import events


@dataclass(slots=True)
class Raw:
    """What the client kept of one request: bytes as they came, each read with its time on the client's clock.

    ``start`` is the load point's start on that clock, seconds. ``error`` names what broke the exchange ("" when the
    response ended as HTTP says); ``record`` carries what is known already (place, lengths asked, times of sending).
    """

    record: Record
    start: float
    api: str
    status: int
    content_type: str
    reads: list[tuple[float, bytes]]
    error: str


@dataclass(frozen=True, slots=True)
class Digest:
    """What the sender learns of a digested request.

    ``reads`` is how many reads brought its output, ``cpu_s`` the digesting process's CPU time so far, seconds.
    """

    ok: bool
    error: str
    reads: int
    cpu_s: float


def to_record(raw: Raw) -> tuple[Record, int]:
    """Return the finished record of a request and the number of reads that brought its output."""
    record = raw.record
    record.status = raw.status
    if raw.status == 200 and "text/event-stream" in raw.content_type:
        reply = read_reply(raw.api, events(raw.reads))
        times = [t - raw.start for t in reply.times]
        record.chunk_s, record.chunk_tokens = times, reply.tokens
        record.first_s, record.end_s = (times[0], times[-1]) if times else (math.nan, math.nan)
        record.prompt_tokens = reply.prompt_tokens
        record.output_tokens = reply.output_tokens
        record.cached_tokens = reply.cached_tokens
        record.finish_reason = reply.finish_reason
        record.output_sha256 = reply.sha256()
        record.error = reply.error or raw.error
        if not record.error and not (reply.done or reply.finish_reason):
            record.error = "truncated: the stream ended without a finish reason or [DONE]"
        if not record.error and not reply.times:
            record.error = "no output: the stream held no token"
        read_count = len(set(reply.reads))
    else:
        record.error = raw.error or _refusal(raw)
        read_count = 0
    record.ok = not record.error
    return record, read_count


def _refusal(raw: Raw) -> str:
    body = b"".join(part for _, part in raw.reads)
    try:
        message: object = json.loads(body)
    except ValueError:
        message = body.decode("utf-8", "replace")
    said = error_text(message)
    if raw.status != 200:
        return f"HTTP {raw.status}: {said}" if said else f"HTTP {raw.status}"
    if isinstance(message, dict) and (message.get("error") or message.get("object") == "error"):
        return f"HTTP 200 with an error: {said}"
    kind = raw.content_type or "no content type"
    return f"not streamed: the answer came whole ({kind}), so it has no token times: {said}"


_journal: Path


def start(journal: Path) -> None:
    """Set a digesting process up: where it writes; signals are for the sender; it ends when the sender does."""
    global _journal
    _journal = journal
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # On a small machine the sender's stamps come first.
    os.nice(5)
    sender = parent_process()
    if sender is not None:

        def follow() -> None:
            sender.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def digest(raws: list[Raw]) -> list[Digest]:
    """Digest requests and append them to the journal; return what the sender shows. Raise OSError (disk full)."""
    results = []
    with _journal.open("a", encoding="utf-8") as lines:
        for raw in raws:
            record, reads = to_record(raw)
            lines.write(record.to_line())
            results.append(Digest(record.ok, record.error, reads, time.process_time()))
    return results
