"""What goes over the wire: events and JSON bodies of the three generate routes, in SGLang 0.5.23's shapes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pdbench.emulate.asks import Ask, Body
from pdbench.emulate.text import WORD_BYTES, WORD_LENGTH, Output, word

DONE = b"data: [DONE]\n\n"
#: Stands in a template for the text of a token: as long as every word, hence the frame around it fits them all.
_HOLE = "~" * WORD_LENGTH
_HOLE_JSON = json.dumps(_HOLE).encode()
#: Log-probability of a token that the model would not have chosen, in nats.
_UNLIKELY = -12.0
#: Turns an event into what is written to the socket: a chunk of HTTP/1.1, or the event as it is.
Frame = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Ending:
    """How one item of a reply came to be: its output tokens, those of its prompt that were cached, seconds since arrival."""

    digest: bytes
    tokens: int
    cached_tokens: int
    e2e_s: float
    aborted: str = ""

    @property
    def finish(self) -> str:
        """The finish reason of the OpenAI routes."""
        return "abort" if self.aborted else "length"

    @property
    def reason(self) -> Body:
        """The finish reason of `/generate`."""
        if self.aborted:
            return {"type": "abort", "message": self.aborted, "status_code": None, "err_type": None}
        return {"type": "length", "length": self.tokens}


def _event(body: Body) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _around_hole(event: bytes) -> tuple[bytes, bytes]:
    """Return what comes before and after a token's text. No name can hold the hole: its quotes would be escaped there."""
    head, tail = event.split(_HOLE_JSON)
    return head + b'"', b'"' + tail


def usage(prompt_tokens: int, output_tokens: int, cached_tokens: int) -> Body:
    """Return the usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "completion_tokens": output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "reasoning_tokens": 0,
    }


def openai_error(message: str, status: int) -> Body:
    """Return SGLang's error object for a status code."""
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


class Stream(Protocol):
    """The events of one item of a streamed reply, framed for the wire."""

    def token(self, index: int) -> bytes:
        """Return what is sent when output token `index`, which is not the last, is due (once each, in order)."""

    def last(self, ending: Ending, token: bool) -> bytes:
        """Return what ends the item: with its last token, or (`token` false) after the last one or without any."""

    def empty(self) -> bytes:
        """Return an event that has neither text nor tokens."""

    def error(self, message: str, status: int) -> bytes:
        """Return the event that tells of a failure after the stream began."""


class Completion:
    """One choice of `/v1/completions`."""

    def __init__(self, ask: Ask, place: int, output: Output, head: Body, cached: int, frame: Frame) -> None:
        """Prepare the parts of an event that never change."""
        self._output, self._prompt, self._cached, self._frame = output, ask.items[place].prompt.tokens, cached, frame
        self._continuous = ask.continuous_usage
        self._place, self._head = place, head
        self._before, self._after = _around_hole(frame(self._body(_HOLE, None, None)))

    def _body(self, text: str, finish: str | None, tokens: int | None) -> bytes:
        counted = usage(self._prompt, tokens, self._cached) if tokens is not None and self._continuous else None
        choice = {"index": self._place, "text": text, "logprobs": None, "finish_reason": finish, "matched_stop": None}
        return _event({**self._head, "choices": [choice], "usage": counted})

    def token(self, index: int) -> bytes:
        """Return the event of one token."""
        token = self._output.token(index)
        if self._continuous:
            return self._frame(self._body(word(token), None, index + 1))
        return self._before + WORD_BYTES[token] + self._after

    def last(self, ending: Ending, token: bool) -> bytes:
        """Return the event of the last token, or one without text."""
        text = word(self._output.token(ending.tokens - 1)) if token else ""
        return self._frame(self._body(text, ending.finish, ending.tokens))

    def empty(self) -> bytes:
        """Return an event with an empty text."""
        return self._frame(self._body("", None, 0))

    def error(self, message: str, status: int) -> bytes:
        """Return the error event."""
        return self._frame(_event({"error": openai_error(message, status)}))


class Chat:
    """The one choice of `/v1/chat/completions`: a role event before the first token, a finish event after the last."""

    def __init__(self, ask: Ask, output: Output, head: Body, cached: int, frame: Frame) -> None:
        """Prepare the parts of an event that never change."""
        self._output, self._prompt, self._cached, self._frame = output, ask.items[0].prompt.tokens, cached, frame
        self._continuous = ask.continuous_usage
        self._head = head
        self._before, self._after = _around_hole(frame(self._body({"content": _HOLE}, None, None)))

    def _body(self, delta: Body, finish: str | None, tokens: int | None) -> bytes:
        counted = usage(self._prompt, tokens, self._cached) if tokens is not None and self._continuous else None
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "matched_stop": None}
        return _event({**self._head, "choices": [choice], "usage": counted})

    def token(self, index: int) -> bytes:
        """Return the event of one token, after that of the role when it is the first."""
        token = self._output.token(index)
        if self._continuous:
            event = self._frame(self._body({"content": word(token)}, None, index + 1))
        else:
            event = self._before + WORD_BYTES[token] + self._after
        return event if index else self.empty() + event

    def last(self, ending: Ending, token: bool) -> bytes:
        """Return the last token's event, if there is one, and that of the finish."""
        event = self.token(ending.tokens - 1) if token else b""
        return event + self._frame(self._body({}, ending.finish, ending.tokens))

    def empty(self) -> bytes:
        """Return the event of the role."""
        return self._frame(self._body({"role": "assistant", "content": ""}, None, 0))

    def error(self, message: str, status: int) -> bytes:
        """Return the error event."""
        return self._frame(_event({"error": openai_error(message, status)}))


class Generate:
    """One item of `/generate`: text and ids are cumulative, as SGLang sends them by default."""

    def __init__(self, ask: Ask, place: int, output: Output, cached: int, frame: Frame) -> None:
        """Start with no output."""
        self._output, self._item, self._cached, self._frame = output, ask.items[place], cached, frame
        self._place: Body = {"index": place} if ask.batch else {}
        # The growing parts are kept as JSON: to make them anew for every token would cost more than all the rest.
        self._text = self._ids = b""
        rest: Body = {"meta_info": {**self._meta(0, None), "completion_tokens": _HOLE}, **self._place}
        before, self._after = json.dumps(rest, separators=(",", ":")).encode().split(_HOLE_JSON)
        self._middle = b"]," + before[1:]
        self._after += b"\n\n"

    def _meta(self, tokens: int, finish: Body | None) -> Body:
        return {
            "id": self._item.rid,
            "finish_reason": finish,
            "prompt_tokens": self._item.prompt.tokens,
            "weight_version": "default",
            "completion_tokens": tokens,
            "cached_tokens": self._cached,
            "reasoning_tokens": 0,
            "dp_rank": None,
        }

    def body(self, ending: Ending) -> Body:
        """Return the whole reply."""
        ids = [self._output.token(index) for index in range(ending.tokens)]
        meta = {**self._meta(ending.tokens, ending.reason), "e2e_latency": ending.e2e_s, **self._logprobs(ids)}
        return {"text": "".join(map(word, ids)), "output_ids": ids, "meta_info": meta, **self._place}

    def _logprobs(self, ids: list[int]) -> Body:
        """Return what return_logprob adds: the model is certain of its token, and holds every other one for very unlikely.

        Rows are [log-probability in nats, id, text]. Those of the input judge its end as the answer to what comes before.
        """
        item = self._item
        if not item.logprobs:
            return {}
        right = Output(item.scored_digest)
        wanted = [right.token(place) for place in range(len(item.scored_ids) - 1)]
        judged = [[0.0 if id == best else _UNLIKELY, id, None] for id, best in zip(item.scored_ids[1:], wanted, strict=True)]
        return {
            "output_token_logprobs": [[0.0, id, None] for id in ids],
            "input_token_logprobs": [[None, item.scored_ids[0], None], *judged] if item.scored_ids else [],
            "input_top_logprobs": [None, *([[0.0, best, None]] for best in wanted)] if item.scored_ids else [],
        }

    def token(self, index: int) -> bytes:
        """Return the event of one token, with all before it."""
        token = self._output.token(index)
        self._text += WORD_BYTES[token]
        self._ids += b",%d" % token if index else b"%d" % token
        return self._frame(
            b'data: {"text":"%b","output_ids":[%b%b%d%b' % (self._text, self._ids, self._middle, index + 1, self._after)
        )

    def last(self, ending: Ending, token: bool) -> bytes:
        """Return the event with all tokens and the finish reason."""
        return self._frame(_event(self.body(ending)))

    def empty(self) -> bytes:
        """Return an event without output."""
        return self._frame(_event({"text": "", "output_ids": [], "meta_info": self._meta(0, None), **self._place}))

    def error(self, message: str, status: int) -> bytes:
        """Return an event whose finish reason is abort: the way of `/generate` to tell of a failure."""
        kind = "BadRequestError" if status < 500 else "InternalServerError"
        finish: Body = {"type": "abort", "message": message, "status_code": status, "err_type": kind}
        return self._frame(_event({"text": "", "output_ids": [], "meta_info": self._meta(0, finish), **self._place}))


def _unframed(event: bytes) -> bytes:
    return event


class Reply:
    """One reply with all of its items."""

    def __init__(self, ask: Ask, frame: Frame = _unframed) -> None:
        """Date it; `frame` is how events go over the wire."""
        self._ask, self._frame = ask, frame
        self._created = int(time.time())

    def _head(self, kind: str) -> Body:
        return {"id": self._ask.items[0].rid, "object": kind, "created": self._created, "model": self._ask.model}

    def stream(self, place: int, digest: bytes, cached_tokens: int = 0) -> Stream:
        """Return the events of one item, made from the digest that its KV cache carried."""
        output = Output(digest)
        if self._ask.api == "generate":
            return Generate(self._ask, place, output, cached_tokens, self._frame)
        if self._ask.api == "completions":
            return Completion(self._ask, place, output, self._head("text_completion"), cached_tokens, self._frame)
        return Chat(self._ask, output, self._head("chat.completion.chunk"), cached_tokens, self._frame)

    def end(self, endings: list[Ending] | None) -> bytes:
        """Return what comes after all items of a stream; None: they failed."""
        usage_event = b""
        if endings is not None and self._ask.include_usage and self._ask.api != "generate":
            head = self._head("text_completion" if self._ask.api == "completions" else "chat.completion.chunk")
            usage_event = self._frame(_event({**head, "choices": [], "usage": self._usage(endings)}))
        return usage_event + self._frame(DONE)

    def _usage(self, endings: list[Ending]) -> Body:
        prompt = sum(item.prompt.tokens for item in self._ask.items)
        return usage(prompt, sum(ending.tokens for ending in endings), sum(ending.cached_tokens for ending in endings))

    def whole(self, endings: list[Ending]) -> Body | list[Body]:
        """Return the reply that is not streamed, from how each item ended."""
        outputs = [Output(ending.digest) for ending in endings]
        pairs = list(zip(outputs, endings, strict=True))
        if self._ask.api == "generate":
            bodies = [
                Generate(self._ask, place, output, ending.cached_tokens, self._frame).body(ending)
                for place, (output, ending) in enumerate(pairs)
            ]
            return bodies if self._ask.batch else bodies[0]
        chat = self._ask.api == "chat"
        choices: list[Body] = []
        for place, (output, ending) in enumerate(pairs):
            text = "".join(word(output.token(index)) for index in range(ending.tokens))
            choices.append(
                {
                    "index": place,
                    **({"message": {"role": "assistant", "content": text}} if chat else {"text": text}),
                    "logprobs": None,
                    "finish_reason": ending.finish,
                    "matched_stop": None,
                }
            )
        return {
            **self._head("chat.completion" if chat else "text_completion"),
            "choices": choices,
            "usage": self._usage(endings),
        }
