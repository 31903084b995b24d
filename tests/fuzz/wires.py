"""What servers send: streams of events, pages of metrics; and what a killed client leaves in its spool."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz import law
from fuzz.damage import as_json, spoiled, torn
from pdbench.evidence import parse_metrics
from pdbench.hostmetrics import gpu_samples
from pdbench.records import Record
from pdbench.run import spool
from pdbench.run.digest import Raw, to_record
from pdbench.run.exchange import Exchange


def _completions(tokens: int) -> list[Any]:
    said = [{"choices": [{"text": f" w{n}é"}], "usage": {"completion_tokens": n + 1, "prompt_tokens": 5}} for n in range(tokens)]
    said[-1]["choices"] = [{"text": " end", "finish_reason": "length"}]
    return [
        *said,
        {
            "choices": [],
            "usage": {"prompt_tokens": 5, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 0}},
        },
    ]


def _chat(tokens: int) -> list[Any]:
    said: list[Any] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    said += [{"choices": [{"delta": {"content": f" w{n}"}}]} for n in range(tokens)]
    return [*said, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]


def _generate(tokens: int) -> list[Any]:
    rows: list[Any] = [
        {"text": " x" * (n + 1), "output_ids": [n], "meta_info": {"completion_tokens": n + 1, "prompt_tokens": 5}}
        for n in range(tokens)
    ]
    rows[-1]["meta_info"] |= {"finish_reason": {"type": "length"}, "cached_tokens": 0}
    return rows


STREAMS = {"completions": _completions(5), "chat": _chat(5), "generate": _generate(5)}
METRICS = """# HELP sglang:num_requests_total All requests.
# TYPE sglang:num_requests_total counter
sglang:num_requests_total{model_name="a b",path="c:\\\\d \\"e\\" }",tp_rank="0"} 24.0
# TYPE sglang:ttft_seconds histogram
sglang:ttft_seconds_bucket{le="0.1"} 3
sglang:ttft_seconds_bucket{le="+Inf"} 5
sglang:ttft_seconds_sum 1.25e-1
sglang:ttft_seconds_count 5
up 1
"""
PAGE = parse_metrics(METRICS)


def sent(events: list[Any], end: bytes = b"\n\n") -> bytes:
    body = b"".join(b"data: " + as_json(event) + end for event in events)
    return body + b"data: [DONE]" + end


def raw(api: str, body: bytes, at: list[int], status: int = 200, kind: str = "text/event-stream") -> Raw:
    """An exchange whose body came in reads that were cut at these places."""
    places = sorted({0, *(p for p in at if p < len(body)), len(body)})
    lengths = [b - a for a, b in pairwise(places)]
    record = Record(0, 0, "measure", 5, 5, sent_s=0.5)
    return Raw(record, 0.0, api, status, kind, [1.0 + n for n in range(len(lengths))], lengths, body, "")


def digested(one: Raw) -> Record:
    """The record, which must be one that our files can hold, and that says why where it is not good."""
    with law.ends():
        record, _ = to_record(one)
        line = record.to_line().encode("utf-8")
    assert record.ok == (not record.error)
    assert "\n" not in record.error
    assert len(record.error) <= 300
    assert Record.from_mapping(json.loads(line)).error == record.error
    if record.ok:
        assert record.chunk_s
        assert not math.isnan(record.first_s)
        assert record.chunk_s == sorted(record.chunk_s)
        assert not record.chunk_tokens or len(record.chunk_tokens) == len(record.chunk_s)
    return record


CUTS = st.lists(st.integers(0, 900), max_size=8)


def stream(data: st.DataObject) -> None:
    """A broken stream becomes a failed request with its reason, or a good one, and never the end of the digester."""
    api = data.draw(st.sampled_from(sorted(STREAMS)))
    values = spoiled(STREAMS[api]).map(lambda found: sent(found if isinstance(found, list) else [found]))
    body = data.draw(st.one_of(values, values, torn(sent(STREAMS[api]))))
    digested(raw(api, body, data.draw(CUTS)))


def good_stream(data: st.DataObject) -> None:
    """Wherever it is cut, with comments and with any line ends, a good stream says the same."""
    api = data.draw(st.sampled_from(sorted(STREAMS)))
    end = data.draw(st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r", b"\n: ping\n\n", b"\nid: 3\n\n"]))
    plain, other = digested(raw(api, sent(STREAMS[api]), [])), digested(raw(api, sent(STREAMS[api], end), data.draw(CUTS)))
    assert plain.ok, plain.error
    for name in ("ok", "error", "output_tokens", "chunk_tokens", "prompt_tokens", "output_sha256", "finish_reason"):
        assert getattr(plain, name) == getattr(other, name)


def refusal(data: st.DataObject) -> None:
    """What came instead of a stream: an error page, half of one, nothing."""
    body = data.draw(st.one_of(spoiled({"error": {"message": "no workers", "code": 503}}).map(as_json), torn(b'{"error": "x"}')))
    status = data.draw(st.sampled_from([200, 400, 503, 0]))
    record = digested(
        raw("chat", body, data.draw(CUTS), status, data.draw(st.sampled_from(["application/json", "", "text/event-stream"])))
    )
    assert status == 200 or not record.ok


def metrics(data: st.DataObject) -> None:
    """A torn page: what is read of it is numbers with names."""
    text = data.draw(torn(METRICS.encode())).decode("utf-8", "replace")
    with law.ends():
        found = parse_metrics(text)
    assert all(name and math.isfinite(value) for name, value in found.items())


def good_metrics(data: st.DataObject) -> None:
    """Comments, blank lines, time stamps and the order of families change nothing."""
    families = data.draw(st.permutations(METRICS.split("# TYPE")))
    assert families is not None
    stamp = data.draw(st.sampled_from(["", " 1700000000000"]))
    rows = [line + (stamp if line and not line.startswith("#") else "") for line in METRICS.splitlines()]
    at = data.draw(st.integers(0, len(rows)))
    rows.insert(at, data.draw(st.sampled_from(["", "# EOF", "# a comment", "#", "   "])))
    with law.ends():
        assert parse_metrics(data.draw(st.sampled_from(["\n", "\r\n"])).join(rows)) == PAGE


def gpus(data: st.DataObject) -> None:
    """A line of nvidia-smi."""
    line = data.draw(torn(b"0, 35, 1024, 81559, 67.21, 41, 1980")).decode("utf-8", "replace")
    with law.ends():
        gpu_samples(line)


def _spooled() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        writer = spool.Writer(Path(folder), 0)
        for index in range(3):
            made = Exchange(index, 2.0)
            made.sent, made.ended, made.status, made.content_type, made.error = 2.5, 9.0, 200, "text/event-stream", ""
            made.parts.append(b"data: x\n\n")
            made.lengths.append(9)
            made.stamps.append(3.0)
            writer.write(Record(1, index, "measure", 5, 6), 1.5, "generate", made)
        writer.close()
        return next(iter(sorted(Path(folder).iterdir()))).read_bytes()


SPOOL = _spooled()


def spooled(data: st.DataObject) -> None:
    """What a killed sender leaves is cut anywhere: every exchange that is whole comes back."""
    at = data.draw(st.integers(0, len(SPOOL)))
    with tempfile.TemporaryDirectory() as folder, law.ends():
        (Path(folder) / ".spool-0-0").write_bytes(SPOOL[:at])
        assert len(list(spool.leftover(Path(folder)))) == at // (len(SPOOL) // 3)


SURFACES: dict[str, Callable[[st.DataObject], None]] = {
    one.__name__: one for one in (stream, good_stream, refusal, metrics, good_metrics, gpus, spooled)
}
