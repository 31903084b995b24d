"""What goes over the wire: events and JSON bodies of the three generate routes, in SGLang 0.5.23's shapes."""

from __future__ import annotations

import json
import time
import uuid
from typing import Protocol

from pdbench.emulate.asks import Ask, Body
from pdbench.emulate.text import Output, word

DONE = b"data: [DONE]\n\n"
_HOLE = "\x00hole\x00"
_HOLE_JSON = json.dumps(_HOLE)


def _event(body: Body) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _around_hole(body: Body) -> tuple[str, str]:
    """Return the event in two halves, between which the text of a token goes: words need no escaping."""
    head, tail = _event(body).decode().split(_HOLE_JSON)
    return f'{head}"', f'"{tail}'


def usage(prompt_tokens: int, output_tokens: int) -> Body:
    """Return the usage object. Nothing is ever cached: the emulator has no prefix cache."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "completion_tokens": output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "reasoning_tokens": 0,
    }


def openai_error(message: str, status: int) -> Body:
    """Return SGLang's error object for a status code."""
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


class Stream(Protocol):
    """The events of one item of a streamed reply, and its part of a reply that is not streamed."""

    def token(self, index: int, last: bool, e2e_s: float) -> bytes:
        """Return what is sent when output token `index` is due (once each, in order), `e2e_s` after the arrival."""

    def error(self, message: str, status: int) -> bytes:
        """Return the event that tells of a failure after the stream began."""


class Completion:
    """One choice of `/v1/completions`."""

    def __init__(self, ask: Ask, place: int, output: Output, reply_id: str, created: int) -> None:
        """Prepare the parts of an event that never change."""
        self._output, self._prompt = output, ask.items[place].prompt.tokens
        self._continuous = ask.continuous_usage
        head: Body = {"id": reply_id, "object": "text_completion", "created": created, "model": ask.model}
        choice = {"index": place, "text": _HOLE, "logprobs": None, "finish_reason": None, "matched_stop": None}
        self._head = head
        self._going = _around_hole({**head, "choices": [choice], "usage": None})
        self._choice: Body = choice

    def token(self, index: int, last: bool, e2e_s: float) -> bytes:
        """Return the event of one token."""
        text = word(self._output.token(index))
        if not last and not self._continuous:
            return f"{self._going[0]}{text}{self._going[1]}".encode()
        return _event(
            {
                **self._head,
                "choices": [{**self._choice, "text": text, "finish_reason": "length" if last else None}],
                "usage": usage(self._prompt, index + 1) if self._continuous else None,
            }
        )

    def error(self, message: str, status: int) -> bytes:
        """Return the error event."""
        return _event({"error": openai_error(message, status)})


class Chat:
    """The one choice of `/v1/chat/completions`: a role event before the first token, a finish event after the last."""

    def __init__(self, ask: Ask, output: Output, reply_id: str, created: int) -> None:
        """Prepare the parts of an event that never change."""
        self._output, self._prompt = output, ask.items[0].prompt.tokens
        self._continuous = ask.continuous_usage
        self._head: Body = {"id": reply_id, "object": "chat.completion.chunk", "created": created, "model": ask.model}
        self._going = _around_hole(self._chunk({"content": _HOLE}, None, None))

    def _chunk(self, delta: Body, finish: str | None, tokens: int | None) -> Body:
        return {
            **self._head,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "matched_stop": None}],
            "usage": usage(self._prompt, tokens) if tokens is not None and self._continuous else None,
        }

    def token(self, index: int, last: bool, e2e_s: float) -> bytes:
        """Return the event of one token, with the events that come just before or after it."""
        text = word(self._output.token(index))
        if self._continuous:
            event = _event(self._chunk({"content": text}, None, index + 1))
        else:
            event = f"{self._going[0]}{text}{self._going[1]}".encode()
        if index == 0:
            event = _event(self._chunk({"role": "assistant", "content": ""}, None, 0)) + event
        return event + _event(self._chunk({}, "length", index + 1)) if last else event

    def error(self, message: str, status: int) -> bytes:
        """Return the error event."""
        return _event({"error": openai_error(message, status)})


class Generate:
    """One item of `/generate`: text and ids are cumulative, as SGLang sends them by default."""

    def __init__(self, ask: Ask, place: int, output: Output, reply_id: str) -> None:
        """Start with no output."""
        self._output, self._item = output, ask.items[place]
        self._place: Body = {"index": place} if ask.batch else {}
        self._id = reply_id
        # The growing parts are kept as JSON: to make them anew for every token would cost more than all the rest.
        self._text = self._ids = ""
        rest: Body = {"meta_info": {**self._meta(0, None), "completion_tokens": _HOLE}, **self._place}
        self._before, self._after = json.dumps(rest, separators=(",", ":")).split(_HOLE_JSON)

    def _meta(self, tokens: int, finish: Body | None) -> Body:
        return {
            "id": self._id,
            "finish_reason": finish,
            "prompt_tokens": self._item.prompt.tokens,
            "weight_version": "default",
            "completion_tokens": tokens,
            "cached_tokens": 0,
            "reasoning_tokens": 0,
            "dp_rank": None,
        }

    def body(self, tokens: int, finish: Body, e2e_s: float) -> Body:
        """Return the reply with the first `tokens` tokens, complete after `e2e_s` seconds."""
        ids = [self._output.token(index) for index in range(tokens)]
        meta = {**self._meta(tokens, finish), "e2e_latency": e2e_s}
        return {"text": "".join(map(word, ids)), "output_ids": ids, "meta_info": meta, **self._place}

    def token(self, index: int, last: bool, e2e_s: float) -> bytes:
        """Return the event of one token."""
        if last:
            return _event(self.body(index + 1, {"type": "length", "length": index + 1}, e2e_s))
        token = self._output.token(index)
        self._text += word(token)
        self._ids = f"{self._ids},{token}" if index else str(token)
        front = f'data: {{"text":"{self._text}","output_ids":[{self._ids}],'
        return f"{front}{self._before[1:]}{index + 1}{self._after}\n\n".encode()

    def error(self, message: str, status: int) -> bytes:
        """Return an event whose finish reason is abort: the way of `/generate` to tell of a failure."""
        kind = "BadRequestError" if status < 500 else "InternalServerError"
        finish: Body = {"type": "abort", "message": message, "status_code": status, "err_type": kind}
        return _event({"text": "", "output_ids": [], "meta_info": self._meta(0, finish), **self._place})


class Reply:
    """One reply with all of its items."""

    def __init__(self, ask: Ask) -> None:
        """Give it an id and a date."""
        self._ask = ask
        self._id = uuid.uuid4().hex
        self._created = int(time.time())

    def stream(self, place: int, digest: bytes) -> Stream:
        """Return the events of one item, made from the digest that its KV cache carried."""
        output = Output(digest)
        if self._ask.api == "generate":
            return Generate(self._ask, place, output, self._item_id(place))
        if self._ask.api == "completions":
            return Completion(self._ask, place, output, self._id, self._created)
        return Chat(self._ask, output, self._id, self._created)

    def _item_id(self, place: int) -> str:
        return f"{self._id}-{place}" if self._ask.batch else self._id

    def usage_event(self, tokens: list[int]) -> bytes:
        """Return the last event of an OpenAI stream with `include_usage`; `tokens` are the outputs of the items."""
        name = "text_completion" if self._ask.api == "completions" else "chat.completion.chunk"
        head = {"id": self._id, "object": name, "created": self._created, "model": self._ask.model, "choices": []}
        return _event({**head, "usage": self._usage(tokens)})

    def _usage(self, tokens: list[int]) -> Body:
        return usage(sum(item.prompt.tokens for item in self._ask.items), sum(tokens))

    def whole(self, digests: list[bytes], tokens: list[int], e2e_s: list[float]) -> Body | list[Body]:
        """Return the reply that is not streamed, from each item's digest, output tokens and latency in seconds."""
        outputs = [Output(digest) for digest in digests]
        if self._ask.api == "generate":
            parts = [Generate(self._ask, place, output, self._item_id(place)) for place, output in enumerate(outputs)]
            bodies = [
                part.body(count, {"type": "length", "length": count}, seconds)
                for part, count, seconds in zip(parts, tokens, e2e_s, strict=True)
            ]
            return bodies if self._ask.batch else bodies[0]
        texts = ["".join(word(out.token(i)) for i in range(count)) for out, count in zip(outputs, tokens, strict=True)]
        chat = self._ask.api == "chat"
        choices: list[Body] = [
            {
                "index": place,
                **({"message": {"role": "assistant", "content": text}} if chat else {"text": text}),
                "logprobs": None,
                "finish_reason": "length",
                "matched_stop": None,
            }
            for place, text in enumerate(texts)
        ]
        name = "chat.completion" if chat else "text_completion"
        head = {"id": self._id, "object": name, "created": self._created, "model": self._ask.model}
        return {**head, "choices": choices, "usage": self._usage(tokens)}
