"""Requests as the three APIs want them: path and JSON body."""

from __future__ import annotations

import json

from pdbench.load.errors import LoadError
from pdbench.load.prompts import Prompts

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions", "generate": "/generate"}
PROMPT_KINDS = ("auto", "tokens", "text")


def check_prompt_kind(api: str, kind: str) -> None:
    """Refuse token ids on the chat API, which has no field for them."""
    if api == "chat" and kind == "tokens":
        raise LoadError("--prompt tokens does not go with --api chat: chat takes text; use completions or generate")


def ask(api: str, kind: str, model: str, prompt: list[int] | str, osl: int) -> bytes:
    """Return the JSON body that asks for exactly ``osl`` output tokens, streamed, greedily.

    ``ignore_eos`` with a limit forces the length on SGLang and vLLM alike. A minimum of tokens is not asked for
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
        what = {"messages": [{"role": "user", "content": prompt}]}
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


def prompt_of(prompts: Prompts, kind: str, name: str, serial: int, length: int) -> list[int] | str:
    """Return the prompt of the given kind, ``tokens`` or ``text``."""
    return prompts.tokens(name, serial, length) if kind == "tokens" else prompts.text(name, serial, length)


def _body(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
