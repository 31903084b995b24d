"""The KV cache is verified: what is compared, and what comes of workers that fail or answer something else."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from pdbench.engines import engine
from pdbench.evidence import Deployment, Pair
from pdbench.load.prompts import Prompts
from pdbench.run.verify import LIMIT_NATS, OUTPUT_TOKENS, Verifier, lengths

Json = dict[str, Any]
Twist = Callable[[Json], Json | web.Response]
OWN = -2.0


def as_it_is(answer: Json) -> Json:
    return answer


class Workers:
    """A prefill and a decode worker that say what SGLang says; ``over``, ``alone`` change what decode and prefill answer."""

    def __init__(self) -> None:
        self.over: Twist = as_it_is
        self.alone: Twist = as_it_is
        self.bodies: list[tuple[str, Json]] = []
        self.flushed = "ok"

    def app(self, role: str) -> web.Application:
        async def generate(request: web.Request) -> web.Response:
            body = await request.json()
            self.bodies.append((role, body))
            count = body["sampling_params"]["max_new_tokens"]
            ids = [body["input_ids"][-1] + place for place in range(count)]
            meta: Json = {"output_token_logprobs": [[OWN, id, None] for id in ids]}
            if "logprob_start_len" in body:
                given = body["input_ids"][body["logprob_start_len"] :]
                meta["input_token_logprobs"] = [[None, given[0], None], *([OWN, id, None] for id in given[1:])]
                meta["input_top_logprobs"] = [None, *([[OWN, id, None]] for id in given[1:])]
            twist = self.alone if "logprob_start_len" in body else self.over if role == "decode" else as_it_is
            answer = twist({"output_ids": ids, "meta_info": meta})
            return answer if isinstance(answer, web.Response) else web.json_response(answer)

        app = web.Application()
        app.add_routes([web.post("/generate", generate)])
        return app

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Deployment]:
        async with TestServer(self.app("prefill")) as prefill, TestServer(self.app("decode")) as decode:
            urls = {"prefill-0": str(prefill.make_url("/")).rstrip("/"), "decode-0": str(decode.make_url("/")).rstrip("/")}
            yield Deployment("1p1d", engine("sglang"), 0, "", "", urls, (Pair("prefill-0", "decode-0", "127.0.0.1", 9998),))

    async def verified(self, count: int = 2) -> Json:
        async with self.served() as deployment:
            verifier = Verifier(deployment, {}, 30)
            try:
                await verifier.ask(Prompts(1), count)
                await verifier.compare({"prefill-0": {"flush": self.flushed}})
            finally:
                await verifier.close()
        report: Any = verifier.report(count)
        (found,) = report["pairs"]
        return dict(found)


async def test_answers_that_the_prefill_worker_would_give_itself() -> None:
    workers = Workers()
    found = await workers.verified(3)
    assert found == {
        **{"prefill": "prefill-0", "decode": "decode-0", "prompts": 3, "tokens": 3 * (OUTPUT_TOKENS - 1)},
        **{"wrong_prompts": 0, "wrong_tokens": 0, "mean_nats": 0.0, "worst_nats": 0.0, "error": ""},
    }
    over = [body for _, body in workers.bodies if "logprob_start_len" not in body]
    alone = [(role, body) for role, body in workers.bodies if "logprob_start_len" in body]
    # both ends of a pair get the same request; what is compared is handed to nobody
    assert len(over) == 6
    assert len({body["bootstrap_room"] for body in over}) == 3
    assert {body["bootstrap_host"] for body in over} == {"127.0.0.1"}
    assert {(role, body["bootstrap_host"]) for role, body in alone} == {("prefill", "2.2.2.2")}
    assert {len(body["input_ids"]) for body in over} == set(lengths(3))
    assert {body["logprob_start_len"] for _, body in alone} == {length - 1 for length in lengths(3)}


async def test_unlikely_answers_are_a_wrong_kv_cache() -> None:
    def unlikely(answer: Json) -> Json:
        rows = answer["meta_info"]["input_token_logprobs"]
        rows[3][0], rows[9][0] = OWN - 6.2, OWN - 6.2
        return answer

    workers = Workers()
    workers.alone = unlikely
    found = await workers.verified()
    assert (found["wrong_prompts"], found["wrong_tokens"]) == (2, 4)
    assert math.isclose(found["worst_nats"], 2 * 6.2 / (OUTPUT_TOKENS - 1))
    assert found["worst_nats"] > LIMIT_NATS


async def test_one_odd_token_and_the_first_one_are_no_fault() -> None:
    def odd(answer: Json) -> Json:
        rows, tops = (answer["meta_info"][name] for name in ("input_token_logprobs", "input_top_logprobs"))
        rows[1][0] = OWN - 50  # the prefill worker's own token
        tops[4][0][0] = OWN + 0.05  # a tie that fell the other way
        rows[5][0], tops[5][0][0] = OWN - 2, OWN
        # SGLang tells of token 0 in place of the vocabulary's last
        rows[6][:2] = [OWN - 9, 0]
        return answer

    workers = Workers()
    workers.alone = odd
    found = await workers.verified()
    assert (found["tokens"], found["wrong_prompts"], found["wrong_tokens"]) == (2 * (OUTPUT_TOKENS - 2), 0, 2)


async def test_what_cannot_be_compared_is_said() -> None:
    def refuse(_: Json) -> web.Response:
        return web.Response(status=500, text="Decode transfer failed")

    def silent(answer: Json) -> Json:
        return {**answer, "meta_info": {}}

    def short(answer: Json) -> Json:
        rows = answer["meta_info"]["output_token_logprobs"]
        return {**answer, "meta_info": {"output_token_logprobs": rows[:-1]}}

    def other_ids(answer: Json) -> Json:
        for row in answer["meta_info"]["input_token_logprobs"]:
            row[1] += 1
        return answer

    cases: list[tuple[str, Twist, str]] = [
        ("over", refuse, "decode-0: HTTP 500 Decode transfer failed"),
        ("over", silent, "decode-0: answered without the log-probabilities of its tokens"),
        ("over", short, "decode-0: answered 31 tokens, 32 were asked for"),
        ("over", lambda _: web.Response(text="[]"), "decode-0: the answer is no JSON object"),
        ("alone", refuse, "prefill-0: HTTP 500 Decode transfer failed"),
        ("alone", silent, "prefill-0: answered without the log-probabilities of its input"),
        ("alone", other_ids, "prefill-0: told the log-probabilities of other tokens than it was sent"),
    ]
    workers = Workers()
    workers.flushed = "HTTP 400"
    found = await workers.verified()
    assert (found["prompts"], found["error"]) == (0, "prefill-0: its cache could not be emptied: HTTP 400")
    for which, twist, says in cases:
        workers = Workers()
        setattr(workers, which, twist)
        found = await workers.verified()
        assert (found["prompts"], found["error"]) == (0, says)
