"""The bodies of the three generate routes, read into one shape."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from pdbench.emulate.text import Prompt, encode, prompt_of
from pdbench.model.radix import unpack

Api = Literal["generate", "completions", "chat"]
Body = dict[str, object]
_T = TypeVar("_T", str, int)

#: SGLang's own defaults for `/generate` and `/v1/completions`. A chat without a limit runs to the end of the context
#: or of the text there; here no text ends by itself, hence the same figure as for `/generate`.
DEFAULT_OUTPUT_TOKENS: dict[Api, int] = {"generate": 128, "completions": 16, "chat": 128}
#: The host that SGLang's warm-up and health requests name: one worker alone, no transfer.
FAKE_BOOTSTRAP_HOST = "2.2.2.2"


class BadAskError(ValueError):
    """A request that cannot be served: HTTP 400 with this message."""


@dataclass(frozen=True)
class Item:
    """One prompt of a request. `bootstrap_*` say where its KV cache goes or comes from (None: not said).

    `rid` is its name in replies and for `/abort_request`. `scored_ids`: the prompt's last ids, of which log-probabilities
    are told (the first one has none); they are judged as an answer to `scored_digest`, the prompt up to and with the first.
    """

    prompt: Prompt
    output_tokens: int
    bootstrap_host: str | None
    bootstrap_port: int | None
    bootstrap_room: int | None
    rid: str = ""
    logprobs: bool = False
    scored_ids: tuple[int, ...] = ()
    scored_digest: bytes = b""

    @property
    def fake_transfer(self) -> bool:
        """Whether there is no partner and none is to be waited for."""
        return self.bootstrap_host == FAKE_BOOTSTRAP_HOST


@dataclass(frozen=True)
class Ask:
    """One request: `batch` says whether the prompt was a list of prompts, which shapes the reply of `/generate`."""

    api: Api
    items: tuple[Item, ...]
    batch: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    model: str


def read(api: Api, body: object, served_model_name: str, context_length: int) -> Ask:
    """Check a decoded JSON body and return what it asks for. Raises BadAskError."""
    if not isinstance(body, dict):
        raise BadAskError("the body must be a JSON object")
    prompts, batch = {"generate": _generate_prompts, "completions": _completion_prompts, "chat": _chat_prompt}[api](body)
    limit = _output_tokens(api, body)
    for prompt in prompts:
        if prompt.tokens == 0:
            raise BadAskError("the prompt is empty")
        if prompt.tokens + limit > context_length:
            raise BadAskError(
                f"Requested token count exceeds the model's maximum context length of {context_length} tokens: "
                f"{prompt.tokens} in the prompt and {limit} for the output."
            )
    if body.get("n", 1) not in (None, 1):
        raise BadAskError("this emulator answers each prompt once: n must be 1")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadAskError("stream_options must be an object")
    hosts = _per_item(body, "bootstrap_host", str, len(prompts))
    ports = _per_item(body, "bootstrap_port", int, len(prompts))
    for port in ports:
        if port is not None and not 0 < port < 65536:
            raise BadAskError(f"bootstrap_port must be between 1 and 65535, not {port}")
    rooms = _per_item(body, "bootstrap_room", int, len(prompts))
    if isinstance(body.get("bootstrap_room"), int):  # one room for a batch: as in SGLang, the next ones follow
        rooms = [room + place for place, room in enumerate(rooms) if room is not None]
    return Ask(
        api=api,
        items=tuple(
            Item(prompt, limit, host, port, room, rid, *_scored(api, body, prompt))
            for prompt, host, port, room, rid in zip(prompts, hosts, ports, rooms, _rids(body, len(prompts), batch), strict=True)
        ),
        batch=batch,
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        continuous_usage=_flag(options, "continuous_usage_stats"),
        model=str(body.get("model") or served_model_name),
    )


def _scored(api: Api, body: Body, prompt: Prompt) -> tuple[bool, tuple[int, ...], bytes]:
    """Read return_logprob and logprob_start_len, which is -1 where only the output's log-probabilities are wanted."""
    start = body.get("logprob_start_len", -1)
    if api != "generate" or not _flag(body, "return_logprob"):
        return False, (), b""
    if isinstance(start, bool) or not isinstance(start, int) or not -1 <= start < prompt.tokens:
        raise BadAskError(f"logprob_start_len must be a whole number below the prompt's {prompt.tokens} tokens, not {start!r}")
    if start == -1:
        return True, (), b""
    ids = unpack(prompt.packed)
    return True, tuple(ids[start:]), prompt_of(ids[: start + 1]).digest


def _per_item(body: Body, key: str, kind: type[_T], count: int) -> list[_T | None]:
    value = body.get(key)
    values: list[object] = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise BadAskError(f"{key} has {len(values)} entries for {count} prompts")
    for entry in values:
        if entry is not None and (isinstance(entry, bool) or not isinstance(entry, kind)):
            raise BadAskError(f"{key} must be {'text' if kind is str else 'a whole number'}, not {entry!r}")
    return cast(list[_T | None], values)


def _rids(body: Body, count: int, batch: bool) -> list[str]:
    """Name every prompt: as in SGLang, one rid for a batch gets the prompt's place behind it."""
    rid = body.get("rid")
    if batch and isinstance(rid, str):
        return [f"{rid}_{place}" for place in range(count)]
    return [given or uuid.uuid4().hex for given in _per_item(body, "rid", str, count)]


def _flag(body: Body, key: str) -> bool:
    value = body.get(key)
    if value not in (None, True, False):
        raise BadAskError(f"{key} must be true or false, not {value!r}")
    return bool(value)


def _output_tokens(api: Api, body: Body) -> int:
    low_key, source = "min_tokens", body
    high_keys: tuple[str, ...] = ("max_completion_tokens", "max_tokens")
    if api == "generate":
        low_key, high_keys = "min_new_tokens", ("max_new_tokens",)
        params = body.get("sampling_params") or {}
        if not isinstance(params, dict):
            raise BadAskError("sampling_params must be an object")
        source = params
    limit: object = next((source[key] for key in high_keys if source.get(key) is not None), DEFAULT_OUTPUT_TOKENS[api])
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise BadAskError(f"{high_keys[-1]} must be at least 1, got {limit!r}")
    low = source.get(low_key) or 0
    if isinstance(low, bool) or not isinstance(low, int) or not 0 <= low <= limit:
        raise BadAskError(f"{low_key} must be in [0, {high_keys[-1]}={limit}], got {low!r}")
    return limit


def _generate_prompts(body: Body) -> tuple[list[Prompt], bool]:
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise BadAskError("give either text or input_ids")
    return _prompts(text if ids is None else ids, "text" if ids is None else "input_ids")


def _completion_prompts(body: Body) -> tuple[list[Prompt], bool]:
    if body.get("prompt") is None:
        raise BadAskError("prompt is missing")
    return _prompts(body["prompt"], "prompt")


def _chat_prompt(body: Body) -> tuple[list[Prompt], bool]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadAskError("messages must be a list of at least one message")
    ids: list[int] = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadAskError("a message must be an object with role and content")
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if text is not None and not isinstance(text, str):
                raise BadAskError("a message's content must be text")
            ids += encode(text or "")
    return [prompt_of(ids)], False


def _prompts(value: object, key: str) -> tuple[list[Prompt], bool]:
    """Read text, a list of texts, a list of token ids or a list of such lists."""
    if isinstance(value, str):
        return [prompt_of(encode(value))], False
    if isinstance(value, list) and value:
        if all(isinstance(entry, str) for entry in value):
            return [prompt_of(encode(entry)) for entry in value], True
        if all(isinstance(entry, list) for entry in value):
            return [_from_ids(entry, key) for entry in value], True
        return [_from_ids(value, key)], False
    raise BadAskError(f"{key} must be text, token ids, or a list of either")


def _from_ids(ids: Sequence[object], key: str) -> Prompt:
    # bool is an int to the array module; true and false are no token ids
    if not all(type(entry) is int for entry in ids):
        raise BadAskError(f"{key} must be text, token ids, or a list of either")
    try:
        return prompt_of(cast(Sequence[int], ids))
    except ValueError as problem:
        raise BadAskError(f"{key}: {problem}") from None
