"""Requests as the three APIs want them: path and JSON body."""

from __future__ import annotations

import json
from functools import lru_cache

from pdbench.load.dataset import Content
from pdbench.load.errors import LoadError
from pdbench.load.prompts import Prompts

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "generate": "/generate"}
PROMPT_KINDS = ("auto", "tokens", "text")
#: what no model's name and no prompt of ours is; JSON has it without escapes
_HERE = "<<the prompt stands here>>"


def check_prompt_kind(api: str, kind: str) -> None:
    """Refuse token ids on the chat API, which has no field for them."""
    if api == "chat" and kind == "tokens":
        raise LoadError("--prompt tokens does not go with --api chat: chat takes text; use completions or generate")


def ask(api: str, kind: str, model: str, prompt: Content, osl: int) -> bytes:
    """Return the JSON body that asks for exactly ``osl`` output tokens, streamed, greedily.

    ``prompt``: token ids or text as ``kind`` says, for chat also messages. ``ignore_eos`` with a limit forces the length
    on SGLang and vLLM alike. A minimum of tokens is not asked for
    beside it: on SGLang that switches a penalty on in every decode step (srt/sampling/penaltylib/min_new_tokens.py)
    and would slow what is measured. ``continuous_usage_stats`` asks for the token count in every event; engines
    honour it, sglang-router 0.3.2 drops it on its way.
    """
    if api == "generate":
        key = "input_ids" if kind == "tokens" else "text"
        sampling = {"max_new_tokens": osl, "ignore_eos": True, "temperature": 0}
        return _body({key: prompt, "sampling_params": sampling, "stream": True})
    what: dict[str, object] = {"prompt": prompt}
    if api == "chat":
        what = {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
    return _body(
        {
            "model": model,
            **what,
            "max_tokens": osl,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    )


@lru_cache(4096)
def frame(api: str, kind: str, model: str, osl: int) -> tuple[bytes, bytes]:
    """Return what stands before and behind the prompt in `ask`'s body; a chat's prompt is the list of messages.

    The rest is encoded by hand, because encoding is most of the time that making a prompt takes.
    """
    messages: list[dict[str, object]] = [{"": _HERE}]
    content: Content = messages if api == "chat" else _HERE
    hole = json.dumps(content, separators=(",", ":")).encode()
    head, tail = ask(api, kind, model, content, osl).split(hole)
    return head, tail


def prompt_of(prompts: Prompts, kind: str, name: str, serial: int, length: int) -> list[int] | str:
    """Return the prompt of the given kind, ``tokens`` or ``text``."""
    return prompts.tokens(name, serial, length) if kind == "tokens" else prompts.text(name, serial, length)


def _body(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
