"""From raw reads to a record: done by a process of its own, so that parsing never delays a timestamp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pdbench.reading import json_of
from pdbench.records import Record
from pdbench.run.replies import error_text, read_reply
from pdbench.run.sse import events


@dataclass(slots=True)
class Raw:
    """What the client kept of one request: the body, whose k-th read brought ``lengths[k]`` bytes at ``stamps[k]``.

    Stamps are seconds on the client's clock, and ``start`` is the load point's start on it. ``error`` names what broke the
    exchange ("" when the response ended as HTTP says); ``record`` carries what is known already (place, lengths asked,
    times of sending).
    """

    record: Record
    start: float
    api: str
    status: int
    content_type: str
    stamps: Sequence[float]
    lengths: Sequence[int]
    body: bytes
    error: str


def to_record(raw: Raw) -> tuple[Record, int]:
    """Return the finished record of a request and the number of reads that brought its output."""
    record = raw.record
    record.status = raw.status
    if raw.status == 200 and "text/event-stream" in raw.content_type:
        reply = read_reply(raw.api, events(raw.body, raw.stamps, raw.lengths))
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
    body = raw.body
    try:
        message: object = json_of(body)
    except ValueError:
        message = body.decode("utf-8", "replace")
    said = error_text(message)
    if raw.status != 200:
        return f"HTTP {raw.status}: {said}" if said else f"HTTP {raw.status}"
    if isinstance(message, dict) and (message.get("error") or message.get("object") == "error"):
        return f"HTTP 200 with an error: {said}"
    kind = raw.content_type or "no content type"
    return f"not streamed: the answer came whole ({kind}), so it has no token times: {said}"
