"""Is the KV cache that decode workers get the right one? Asked before the first load point, pair by pair.

No second deployment is needed, and no stored answers: the prefill worker of a pair is its own reference.

1. A greedy request goes over the very pair, to both ends directly with one bootstrap room, as a router would send it. The
   decode worker answers tokens, each with the log-probability that it had for it.
2. The prefill worker alone reads prompt and answer together (SGLang: a request that names its fake bootstrap host is handed
   to nobody) and says, for every token of the answer, how likely it was and which token was the likeliest. Its prefix cache
   is emptied in between, so that it computes all of it anew.

With the right KV cache both ends compute the same thing and differ by rounding. With a wrong one the decode worker answers
another prompt, and its tokens are unlikely in this one. A tie that falls the other way changes neither log-probability, so
near-ties need no exception. The first token of an answer is the prefill worker's own and says nothing.

Sources: SGLang 0.5.17 and 0.5.23, ``srt/disaggregation/{prefill,decode,utils}.py`` (FAKE_BOOTSTRAP_HOST; a prefill server
returns the log-probabilities of its input). ``logprob_start_len`` names the token before the first one that is told of.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import aiohttp

from pdbench.evidence import Deployment, Evidence, Pair
from pdbench.load.prompts import Prompts

#: Output tokens of each request, of which all but the first are judged.
OUTPUT_TOKENS = 32
#: Prompt lengths in tokens go from the first to the last, in steps that are no multiple of a page.
_SHORTEST, _LONGEST, _STEP = 100, 1000, 137
#: A prompt is wrong when its answer's log-probabilities differ by more than this on average, in nats (docs/validity.md says why).
LIMIT_NATS = 0.2
#: A token counts as another one than the reference's when it was so much less likely there than the likeliest, in nats.
TOKEN_NATS = 0.5
#: Requests under way at a time: enough that several are in one batch, few enough to leave queues out of it.
_AT_ONCE = 4
#: A pair that does not answer within so many seconds is at fault; the other end gets _GRACE_S after a failure.
_LONGEST_S, _GRACE_S = 120.0, 1.0
#: SGLang's own: it asks nobody for the KV cache, and waits for nobody to take it.
_FAKE_BOOTSTRAP_HOST = "2.2.2.2"

Json = dict[str, object]


class VerifyError(Exception):
    """A request that brought no answer to compare; the message says which worker and why."""


@dataclass(frozen=True)
class Asked:
    """A prompt and what came back over the pair: output token ids and their log-probabilities in nats."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]


@dataclass
class Found:
    """What a pair showed; ``worst_nats``: the largest mean difference of one prompt; ``error``: "" when all could be asked."""

    prefill: str
    decode: str
    prompts: int = 0
    tokens: int = 0
    wrong_prompts: int = 0
    wrong_tokens: int = 0
    mean_nats: float = 0.0
    worst_nats: float = 0.0
    error: str = ""

    def add(self, differences: Sequence[float], wrong_tokens: int) -> None:
        """Take in one prompt: the differences of its tokens in nats, and how many tokens were not the reference's."""
        mean = sum(differences) / len(differences)
        self.prompts += 1
        self.mean_nats = (self.mean_nats * self.tokens + sum(differences)) / (self.tokens + len(differences))
        self.tokens += len(differences)
        self.wrong_tokens += wrong_tokens
        self.wrong_prompts += mean > LIMIT_NATS
        self.worst_nats = max(self.worst_nats, mean)


def lengths(count: int) -> list[int]:
    """Return the prompts' lengths in tokens."""
    return [_SHORTEST + place * _STEP % (_LONGEST - _SHORTEST) for place in range(count)]


class Verifier:
    """Asks every pair of a deployment; ``headers`` carry the key, where there is one.

    ``asked``: what was sent over each pair, in the deployment's order, and what came back.
    """

    def __init__(self, deployment: Deployment, headers: Mapping[str, str], timeout_s: float) -> None:
        """Make ready; a request may last ``timeout_s`` seconds at most."""
        self._deployment = deployment
        timeout = aiohttp.ClientTimeout(total=min(timeout_s, _LONGEST_S))
        connector = aiohttp.TCPConnector(force_close=True)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector, trust_env=False)
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._found = [Found(pair.prefill, pair.decode) for pair in deployment.pairs]
        self.asked: list[list[Asked]] = [[] for _ in self._found]

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def ask(self, prompts: Prompts, count: int) -> None:
        """Send ``count`` prompts over every pair, each another one; what fails stands in the report."""
        for place, (pair, found, asked) in enumerate(zip(self._deployment.pairs, self._found, self.asked, strict=True)):
            names = [(f"verify/{place}/{i}", place * count + i, size) for i, size in enumerate(lengths(count))]
            tries = [self._over(pair, prompts.tokens(*name)) for name in names]
            for answer in await asyncio.gather(*tries, return_exceptions=True):
                if isinstance(answer, Asked):
                    asked.append(answer)
                elif isinstance(answer, VerifyError):
                    found.error = found.error or str(answer)
                else:
                    raise answer

    async def compare(self, emptied: Mapping[str, object]) -> None:
        """Let each pair's prefill worker read what was answered; ``emptied``: what its cache said to that."""
        for pair, found, asked in zip(self._deployment.pairs, self._found, self.asked, strict=True):
            steps = emptied.get(pair.prefill)
            flush = steps.get("flush") if isinstance(steps, dict) else None
            if flush != "ok":
                found.error = found.error or f"{pair.prefill}: its cache could not be emptied: {flush}"
                continue
            for answer in await asyncio.gather(*(self._differences(pair, one) for one in asked), return_exceptions=True):
                if isinstance(answer, tuple):
                    found.add(*answer)
                elif isinstance(answer, VerifyError):
                    found.error = found.error or str(answer)
                else:
                    raise answer

    def report(self, count: int) -> Json:
        """Return ``verify`` of evidence.json."""
        limits = {"output_tokens": OUTPUT_TOKENS, "limit_nats": LIMIT_NATS, "token_nats": TOKEN_NATS}
        return {"prompts": count, **limits, "pairs": [asdict(found) for found in self._found]}

    async def _over(self, pair: Pair, prompt: list[int]) -> Asked:
        body: Json = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
            "bootstrap_host": pair.bootstrap_host,
            "bootstrap_port": pair.bootstrap_port,
            "bootstrap_room": random.getrandbits(62),
        }
        async with self._slots:
            ends = {name: asyncio.create_task(self._generate(name, body)) for name in (pair.prefill, pair.decode)}
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
            ids, logprobs = [int(str(row[1])) for row in told], [float(str(row[0])) for row in told]
        except (KeyError, TypeError, ValueError, IndexError):
            raise VerifyError(f"{pair.decode}: answered without the log-probabilities of its tokens") from None
        if len(ids) != OUTPUT_TOKENS:
            raise VerifyError(f"{pair.decode}: answered {len(ids)} tokens, {OUTPUT_TOKENS} were asked for")
        return Asked(prompt, ids, logprobs)

    async def _differences(self, pair: Pair, asked: Asked) -> tuple[list[float], int]:
        """Return the differences of the answer's tokens but the first, in nats, and how many are not the reference's."""
        body: Json = {
            "input_ids": asked.prompt + asked.ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": len(asked.prompt) - 1,
            "top_logprobs_num": 1,
            "bootstrap_host": _FAKE_BOOTSTRAP_HOST,
            "bootstrap_room": random.getrandbits(62),
        }
        async with self._slots:
            answer = await self._generate(pair.prefill, body)
        try:
            # The first row is the prompt's last token, which has none.
            rows, tops = _rows(answer, "input_token_logprobs")[1:], _rows(answer, "input_top_logprobs")[1:]
            likely = [(int(str(row[1])), float(str(row[0])), float(str(top[0][0]))) for row, top in zip(rows, tops, strict=True)]
        except (KeyError, TypeError, ValueError, IndexError):
            raise VerifyError(f"{pair.prefill}: answered without the log-probabilities of its input") from None
        if len(likely) != len(asked.ids):
            raise VerifyError(
                f"{pair.prefill}: told the log-probabilities of {len(likely)} tokens, {len(asked.ids)} were asked for"
            )
        # SGLang tells of token 0 in place of the last one of the vocabulary: that place cannot be compared.
        judged = [
            (own, logprob, best)
            for own, id, (told, logprob, best) in list(zip(asked.logprobs, asked.ids, likely, strict=True))[1:]
            if id == told
        ]
        if len(judged) < len(asked.ids) // 2:
            raise VerifyError(f"{pair.prefill}: told the log-probabilities of other tokens than it was sent")
        return [abs(own - logprob) for own, logprob, _ in judged], sum(best - logprob > TOKEN_NATS for _, logprob, best in judged)

    async def _generate(self, worker: str, body: Json) -> Json:
        url = f"{self._deployment.workers[worker]}/generate"
        try:
            async with self._session.post(url, json=body) as response:
                if response.status != 200:
                    text = " ".join((await response.text()).split())[:200]
                    raise VerifyError(f"{worker}: HTTP {response.status} {text}".rstrip())
                answer = await response.json(content_type=None)
        except TimeoutError:
            raise VerifyError(f"{worker}: no answer in time") from None
        except (aiohttp.ClientError, OSError, ValueError) as why:
            raise VerifyError(f"{worker}: {why or type(why).__name__}") from None
        if not isinstance(answer, dict):
            raise VerifyError(f"{worker}: the answer is no JSON object")
        return answer


def _rows(answer: Mapping[str, object], name: str) -> list[list[list[object]]]:
    meta = answer["meta_info"]
    rows = meta[name] if isinstance(meta, dict) else None
    if not isinstance(rows, list):
        raise TypeError(name)
    return rows


async def verify(
    evidence: Evidence, prompts: Prompts, count: int, headers: Mapping[str, str], timeout_s: float
) -> dict[str, object]:
    """Return what came of asking every pair with ``count`` prompts.

    The workers must be idle; the next load point empties their caches.
    """
    if not evidence.deployment.engine.verifiable:
        reason = "the prefill workers of this engine cannot be asked for the log-probabilities of an answer"
        return {"prompts": count, "reason": reason, "pairs": []}
    verifier = Verifier(evidence.deployment, headers, timeout_s)
    try:
        await evidence.reset({})
        await verifier.ask(prompts, count)
        emptied: dict[str, object] = {}
        await evidence.reset(emptied)
        await verifier.compare(emptied)
    finally:
        await verifier.close()
    return verifier.report(count)
