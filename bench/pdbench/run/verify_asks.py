"""The requests by which `pdbench.run.verify` asks the ends of a pair, engine by engine, and what their answers tell.

Sources: SGLang 0.5.17 and 0.5.23, ``srt/disaggregation/{prefill,decode,utils}.py`` (FAKE_BOOTSTRAP_HOST; a prefill server
returns the log-probabilities of its input); ``logprob_start_len`` names the token before the first one that is told of.
vLLM 0.32 and 0.33, ``entrypoints/openai/completion/protocol.py`` and ``sampling_params.py``: a request for ``prompt_logprobs``
reads nothing from the prefix cache.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from pdbench.evidence import Pair

Json = dict[str, object]
#: Sends a body to a path of a worker, and returns the JSON object that it answers; raises VerifyError.
Post = Callable[[str, str, Json], Awaitable[Json]]
#: After a failure at one end the other one gets so many seconds.
_GRACE_S = 1.0
#: SGLang's own: it asks nobody for the KV cache, and waits for nobody to take it.
_FAKE_BOOTSTRAP_HOST = "2.2.2.2"
_NO_INPUT = "{}: answered without the log-probabilities of its input"
_UNTOLD = (KeyError, TypeError, ValueError, IndexError, AttributeError)


class VerifyError(Exception):
    """A request that brought no answer to compare; the message says which worker and why."""


class Way(Protocol):
    """How an engine is asked."""

    async def over(self, post: Post, pair: Pair, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """Send a prompt over a pair; return ``count`` greedy token ids and each one's log-probability in nats, as decode says."""

    async def alone(self, post: Post, pair: Pair, prompt: list[int], ids: list[int]) -> list[tuple[int, float, float]]:
        """Let prefill alone read both; return of each token of the answer id, log-probability and the likeliest's, in nats."""


class Rooms:
    """SGLang: both ends get one request at the same time, with one bootstrap room, as a router would send it."""

    async def over(self, post: Post, pair: Pair, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """Send a prompt over a pair."""
        body: Json = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": count, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
            "bootstrap_host": pair.bootstrap_host,
            "bootstrap_port": pair.bootstrap_port,
            "bootstrap_room": random.getrandbits(62),
        }
        ends = {name: asyncio.ensure_future(post(name, "/generate", body)) for name in (pair.prefill, pair.decode)}
        try:
            await asyncio.wait(ends.values(), return_when=asyncio.FIRST_EXCEPTION)
            # After a failure the other end waits for one that will not come; it may have failed, too, and know better why.
            await asyncio.wait(ends.values(), timeout=_GRACE_S)
            why = [str(end.exception()) for end in ends.values() if end.done() and end.exception()]
            if why:
                raise VerifyError("; ".join(why))
            answer = ends[pair.decode].result()
        finally:
            for end in ends.values():
                end.cancel()
            await asyncio.gather(*ends.values(), return_exceptions=True)
        try:
            told = _rows(answer, "output_token_logprobs")
            return [int(str(row[1])) for row in told], [float(str(row[0])) for row in told]
        except _UNTOLD:
            raise VerifyError(f"{pair.decode}: answered without the log-probabilities of its tokens") from None

    async def alone(self, post: Post, pair: Pair, prompt: list[int], ids: list[int]) -> list[tuple[int, float, float]]:
        """Ask the prefill worker with its fake bootstrap host: what it computes is handed to nobody."""
        body: Json = {
            "input_ids": prompt + ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": len(prompt) - 1,
            "top_logprobs_num": 1,
            "bootstrap_host": _FAKE_BOOTSTRAP_HOST,
            "bootstrap_room": random.getrandbits(62),
        }
        answer = await post(pair.prefill, "/generate", body)
        try:
            # The first row is the prompt's last token, which has none.
            rows, tops = _rows(answer, "input_token_logprobs")[1:], _rows(answer, "input_top_logprobs")[1:]
            return [(int(str(row[1])), float(str(row[0])), float(str(top[0][0]))) for row, top in zip(rows, tops, strict=True)]
        except _UNTOLD:
            raise VerifyError(_NO_INPUT.format(pair.prefill)) from None


class TwoSteps:
    """vLLM's NIXL connector: prefill says where it keeps the KV cache of a prompt, and decode is told so, as routers do it."""

    path = "/v1/completions"

    def __init__(self, model: str) -> None:
        """Ask for a model by its served name."""
        self._model = model

    async def over(self, post: Post, pair: Pair, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """Send a prompt to prefill, then to decode with what prefill told."""
        body = self._body(prompt)
        # vLLM's caches cannot be emptied: without a salt decode would find a prompt of an earlier check, and fetch nothing.
        body |= {"ignore_eos": True, "cache_salt": secrets.token_hex(16)}
        kept: Json = {"do_remote_decode": True, "do_remote_prefill": False}
        first = await post(pair.prefill, self.path, {**body, "max_tokens": 1, "kv_transfer_params": kept})
        told = first.get("kv_transfer_params")
        if not told:
            raise VerifyError(f"{pair.prefill}: answered without kv_transfer_params, so that decode could fetch nothing")
        wanted: Json = {"max_tokens": count, "logprobs": 1, "return_token_ids": True, "kv_transfer_params": told}
        answer = await post(pair.decode, self.path, {**body, **wanted})
        try:
            choice = _choice(answer)
            return [int(id) for id in choice["token_ids"]], [float(value) for value in choice["logprobs"]["token_logprobs"]]
        except _UNTOLD:
            raise VerifyError(f"{pair.decode}: answered without the log-probabilities of its tokens") from None

    async def alone(self, post: Post, pair: Pair, prompt: list[int], ids: list[int]) -> list[tuple[int, float, float]]:
        """Ask the prefill worker, which without kv_transfer_params serves by itself."""
        answer = await post(pair.prefill, self.path, {**self._body(prompt + ids), "max_tokens": 1, "prompt_logprobs": 1})
        try:
            rows = _choice(answer)["prompt_logprobs"][len(prompt) :]
            # The token itself and the likeliest one; the same where it is the likeliest.
            told = [{int(id): float(row["logprob"]) for id, row in entry.items()} for entry in rows]
        except _UNTOLD:
            raise VerifyError(_NO_INPUT.format(pair.prefill)) from None
        return [(id, entry[id], max(entry.values())) for id, entry in zip(ids, told, strict=False) if id in entry]

    def _body(self, prompt: list[int]) -> Json:
        return {"model": self._model, "prompt": prompt, "temperature": 0}


def way(name: str, model: str) -> Way:
    """Return how an engine is asked whose facts say so (`pdbench.engines`); ``model``: the served name."""
    return TwoSteps(model) if name == "two steps" else Rooms()


def _rows(answer: Mapping[str, object], name: str) -> list[list[list[object]]]:
    meta = answer["meta_info"]
    rows = meta[name] if isinstance(meta, dict) else None
    if not isinstance(rows, list):
        raise TypeError(name)
    return rows


def _choice(answer: Mapping[str, object]) -> dict[str, Any]:
    choices = answer["choices"]
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise TypeError("choices")
    return choices[0]
