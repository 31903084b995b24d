"""The load generator through the real sglang-router: no 42 ms on the first chunk, and all three APIs."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import aiohttp
import pytest
from emulated_workers import Service, free_port, router, service, wait_for

from pdbench.run.asks import PATHS, ask
from pdbench.run.exchange import Endpoint, Exchange
from pdbench.run.wire import Wire

TESTS = Path(__file__).resolve().parents[1]
BLOCKS, IN_BLOCK = 4, 7


class Client:
    """The load generator's wire to one server."""

    def __init__(self, url: str) -> None:
        self.done: list[Exchange] = []
        self.wire = Wire(Endpoint(url, PATHS["generate"], {}, 30.0), self.done.append)


@contextlib.contextmanager
def truth(role: str) -> Iterator[Service]:
    port = free_port()
    argv = [sys.executable, str(TESTS / "truth_server.py"), str(port), role]
    with service(argv, f"http://127.0.0.1:{port}", "/ready") as made:
        yield made


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Service, Service]]:
    """The router, and the decode worker behind it."""
    with truth("prefill") as prefill, truth("decode") as decode:
        options = ["--pd-disaggregation", "--prefill", prefill.url, "8998", "--decode", decode.url]
        with router(*options) as front:
            wait_for(lambda: len(front.json("/workers")["workers"]) == 2, "with 2 workers")
            yield front, decode


def ours(client: Client, body: bytes) -> float:
    exchange = Exchange(0, 0.0)
    client.wire.post(exchange, body)
    while not client.done:
        client.wire.poll(1.0)
    client.done.clear()
    assert (exchange.status, exchange.error) == (200, "")
    return exchange.stamps[0] - exchange.sent


async def plain(session: aiohttp.ClientSession, url: str, body: bytes) -> float:
    start = perf_counter()
    async with session.post(url + PATHS["generate"], data=body, headers={"Content-Type": "application/json"}) as response:
        first = await response.content.readany()
        assert first
        at = perf_counter()
        await response.read()
    return at - start


async def test_the_first_chunk_does_not_wait_for_a_delayed_ack(servers: tuple[Service, Service]) -> None:
    """In turns: straight to the worker, through the router as we do, and through it with a plain kept-alive client.

    The plain client is the control: it shows that the artefact is there to be suffered. Requests follow each other at
    once, as under load, and the first two of a block do not count: on a connection that is new or was idle for longer than
    its retransmission timeout, Linux acknowledges at once of itself.
    """
    front, decode = servers
    body = ask("generate", "tokens", "good", list(range(300, 316)), 12)
    times: dict[str, list[float]] = {"direct": [], "ours": [], "plain": []}
    straight, through = Client(decode.url), Client(front.url)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
        try:
            for _ in range(BLOCKS):
                times["direct"] += [ours(straight, body) for _ in range(IN_BLOCK)][2:]
                times["ours"] += [ours(through, body) for _ in range(IN_BLOCK)][2:]
                times["plain"] += [await plain(session, front.url, body) for _ in range(IN_BLOCK)][2:]
        finally:
            straight.wire.close()
            through.wire.close()
    ms = {name: 1000 * statistics.median(found) for name, found in times.items()}
    assert ms["plain"] - ms["direct"] > 30, ms
    assert ms["ours"] - ms["direct"] < 15, ms


@pytest.mark.parametrize(("api", "prompt"), [("completions", "text"), ("chat", "text"), ("generate", "tokens")])
def test_all_apis_through_the_router(servers: tuple[Service, Service], tmp_path: Path, api: str, prompt: str) -> None:
    front, _ = servers
    argv = [sys.executable, "-m", "pdbench", "run", "--url", front.url, "--api", api, "--model", "m", "--concurrency", "2"]
    argv += ["--num-requests", "10", "--isl", "16", "--osl", "8", "--output", str(tmp_path / "o"), "--min-delivered", "0"]
    argv += ["--max-loop-lag-ms", "5000", "--max-lateness-ms", "5000"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert (found["completed"], found["prompt"], found["client"]["tokens_per_event"]) == (10, prompt, 1.0)
