"""What the events of a streamed answer say, for each of the three APIs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import orjson

from pdbench.reading import json_of
from pdbench.records import NOT_REPORTED
from pdbench.run.sse import Event

Json = dict[str, object]


@dataclass(slots=True)
class Reply:
    """A streamed answer: when output came, how many tokens, how it ended. ``error`` is "" when nothing went wrong."""

    times: list[float] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = NOT_REPORTED
    output_tokens: int = NOT_REPORTED
    cached_tokens: int = NOT_REPORTED
    finish_reason: str = ""
    done: bool = False
    error: str = ""
    text: str = ""
    ids: list[int] = field(default_factory=list)
    counted: int = 0
    uncounted: bool = False

    def output(self, event: Event, total: int) -> None:
        """Note an event that carries output; ``total`` is the server's count of output tokens so far, -1 unknown."""
        self.times.append(event.time_s)
        self.reads.append(event.read)
        if total == NOT_REPORTED:
            self.uncounted = True
        else:
            self.tokens.append(total - self.counted)
            self.counted = total

    def sha256(self) -> str:
        """Return the digest of the output: of its text, or of its token ids when the server sends no text."""
        what = self.text or (json.dumps(self.ids) if self.ids else "")
        return hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest() if what else ""


def read_reply(api: str, stream: Sequence[Event]) -> Reply:
    """Interpret the events of one answer on ``api`` (``completions``, ``chat`` or ``generate``).

    An event carries output when it has text, or when the server's own count of output tokens grew with it (text may
    be held back until a character is complete). Empty first chunks, role announcements and usage chunks do not. Tokens
    per event are kept only if every such event states a count. The first error event ends the reading.
    """
    reply = Reply()
    take = _take_generate if api == "generate" else _take_openai
    like: tuple[bytes, bytes] | None = None
    for event in stream:
        if like is not None and (text := _between(event, *like)):
            reply.text += text
            reply.output(event, NOT_REPORTED)
            continue
        if event.data.strip() == b"[DONE]":
            reply.done = True
            continue
        if not event.whole:
            break
        try:
            message = _parse(event.data)
        except ValueError:
            reply.error = f"an event that is no JSON: {_short(event.data)}"
            break
        if not isinstance(message, dict):
            reply.error = f"an event that is no JSON object: {_short(event.data)}"
            break
        if message.get("error") or event.name == "error":
            reply.error = f"error event: {error_text(message)}"
            break
        try:
            before = len(reply.text)
            take(reply, event, message)
            if take is _take_openai and like is None and not event.name:
                like = _around(event.data, reply.text[before:])
        except (TypeError, KeyError, ValueError, AttributeError, IndexError):
            reply.error = f"an event of unknown shape: {_short(event.data)}"
            break
    if reply.uncounted:
        reply.tokens = []
    if not reply.error and reply.finish_reason in ("abort", "error"):
        reply.error = f"the server ended the answer with finish_reason {reply.finish_reason}"
    return reply


def _around(data: bytes, text: str) -> tuple[bytes, bytes] | None:
    """Return what stands before and behind the text of an event that says nothing else, for `_between`.

    Most events of an answer differ in their text alone, and need no parser then. None where that is not certain.
    """
    quoted = b'"' + text.encode("utf-8", "replace") + b'"'
    if not text or not text.isascii() or not text.isprintable() or data.count(quoted) != 1:
        return None
    before, _, behind = data.partition(quoted)
    around = (before + b'"', b'"' + behind)
    mark, silent = "~pd~", Reply()
    event = Event(mark.encode().join(around), 0.0, 0)
    _take_openai(silent, event, cast(Json, _parse(event.data)))
    alone = silent.text == mark and silent.uncounted and not silent.finish_reason
    return around if alone and silent.prompt_tokens == silent.cached_tokens == NOT_REPORTED else None


def _between(event: Event, before: bytes, behind: bytes) -> str:
    """Return the text of an event that is made like another one but for its text; "" when it is not for certain."""
    data = event.data
    if event.name or not data.startswith(before) or not data.endswith(behind):
        return ""
    text = data[len(before) : -len(behind)]
    # What is escaped, ends the string early or is no character is for the parser.
    if b'"' in text or b"\\" in text or len(data) <= len(before) + len(behind) or not event.whole:
        return ""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return ""


def _parse(data: bytes) -> object:
    try:
        return orjson.loads(data)
    except ValueError:
        return json_of(data)  # takes half a surrogate pair and NaN, too


def error_text(message: object) -> str:
    """Return what an error body says, in one short line; the shapes of SGLang, vLLM and the routers are known."""
    found = message
    if isinstance(found, dict):
        found = found.get("error", found)
    if isinstance(found, dict):
        found = found.get("message", found)
    return _short(found if isinstance(found, str) else json.dumps(found))


def _short(text: str | bytes, limit: int = 200) -> str:
    plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    # Half a surrogate pair can stand in JSON, but in no file of ours.
    plain = " ".join(plain.encode("utf-8", "replace").decode().split())
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else NOT_REPORTED


def _take_openai(reply: Reply, event: Event, message: Json) -> None:
    usage = cast(Json, message.get("usage") or {})
    total = _count(usage.get("completion_tokens"))
    if usage:
        reply.prompt_tokens = _count(usage.get("prompt_tokens"))
        reply.output_tokens = total
        details = cast(Json, usage.get("prompt_tokens_details") or {})
        reply.cached_tokens = max(reply.cached_tokens, _count(details.get("cached_tokens")))
    choices = cast(list[Json], message.get("choices") or [])
    if not choices:
        return
    choice = choices[0]
    delta = cast(Json, choice.get("delta") or {})
    parts = (choice.get("text"), delta.get("reasoning_content"), delta.get("content"))
    text = "".join(cast(str, part) for part in parts if part)
    if choice.get("finish_reason"):
        reply.finish_reason = _short(str(choice["finish_reason"]))
    # A chunk that only announces the role says nothing of a token, whatever usage stands beside it.
    if text or (total > reply.counted and not delta.get("role")):
        reply.text += text
        reply.output(event, total)


def _take_generate(reply: Reply, event: Event, message: Json) -> None:
    meta = cast(Json, message.get("meta_info") or {})
    total = _count(meta.get("completion_tokens"))
    text = cast(str, message.get("text") or "")
    ids = cast(list[int], message.get("output_ids") or [])
    fresh = total > reply.counted if total != NOT_REPORTED else bool(ids) or (bool(text) and text != reply.text)
    # SGLang repeats the whole output in every event unless --incremental-streaming-output; the ids, where sent, tell
    # the two apart for certain, the text only by its beginning.
    whole = len(ids) == total if ids and total != NOT_REPORTED else text.startswith(reply.text)
    reply.text = text if whole else reply.text + text
    reply.ids = ids if whole else reply.ids + ids
    if total != NOT_REPORTED:
        reply.output_tokens = total
    reply.prompt_tokens = max(reply.prompt_tokens, _count(meta.get("prompt_tokens")))
    reply.cached_tokens = max(reply.cached_tokens, _count(meta.get("cached_tokens")))
    reason = meta.get("finish_reason")
    if reason:
        kind = reason.get("type") if isinstance(reason, dict) else reason
        reply.finish_reason = _short(str(kind))
        if kind == "abort" and isinstance(reason, dict) and reason.get("message"):
            reply.error = f"the server ended the answer: {_short(str(reason['message']))}"
    if fresh:
        reply.output(event, total)
