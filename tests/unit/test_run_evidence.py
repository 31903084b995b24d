"""Prometheus pages and plans, as far as the evidence needs them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from aiohttp import web

from pdbench import evidence
from pdbench.engines import engine
from pdbench.evidence import Deployment, Evidence, parse_metrics, read_plan, write_metrics
from pdbench.load.errors import LoadError

PAGE = """# HELP sglang:prompt_tokens_total Tokens.
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="a b",x="}"} 12.0
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs 3 1700000000000
# TYPE lat histogram
lat_bucket{le="1"} 4
lat_bucket{le="+Inf"} 5
lat_sum{q="1"} 7.5
lat_count{q="1"} 5
# TYPE gc summary
gc{quantile="0.5"} 1
gc_sum 2
prompt_tokens_created 1.7e9
untyped_thing 1e3
odd NaN
infinite +Inf
not a sample
"""


def test_a_page_keeps_what_counts() -> None:
    assert parse_metrics(PAGE) == {
        'sglang:prompt_tokens_total{model_name="a b",x="}"}': 12.0,
        "sglang:num_running_reqs": 3.0,
        'lat_sum{q="1"}': 7.5,
        'lat_count{q="1"}': 5.0,
        "gc_sum": 2.0,
        "untyped_thing": 1000.0,
    }
    assert parse_metrics("") == {}


def plan(**more: object) -> dict[str, object]:
    ranks = [{"host": "n1", "gpus": [0, 1]}]
    return {
        "ratio": "1p1d",
        "workers": [
            {"name": "prefill-0", "url": "http://127.0.0.1:1/", "ranks": ranks},
            {
                "name": "decode-0",
                "url": "http://127.0.0.1:2",
                "ranks": [{"host": "n1", "gpus": [1]}, {"host": "n2", "gpus": [0]}],
            },
        ],
        "router": {"url": "http://127.0.0.1:3", "metrics_url": "http://127.0.0.1:4/metrics"},
        **more,
    }


def test_a_plan_counts_every_gpu_once(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan()))
    found = read_plan(path)
    assert (found.ratio, found.gpus, found.router_url) == ("1p1d", 3, "http://127.0.0.1:3")
    assert found.workers == {"prefill-0": "http://127.0.0.1:1", "decode-0": "http://127.0.0.1:2"}
    assert found.router_metrics_url == "http://127.0.0.1:4/metrics"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"workers": [{}]}', json.dumps({**plan(), "router": None})])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(LoadError, match=r"is no plan\.json"):
        read_plan(path)
    with pytest.raises(LoadError, match="cannot read the plan"):
        read_plan(tmp_path / "none")


@pytest.mark.parametrize("rows", [[], [(0, 1.5, "router", "up", 'a="b"', 1.0), (1, 2.5, "decode-0", "n", "", 3.0)]])
def test_scrapes_become_rows(tmp_path: Path, rows: list[tuple[int, float, str, str, str, float]]) -> None:
    write_metrics(tmp_path / "m.parquet", rows)
    table = pq.read_table(tmp_path / "m.parquet")
    assert table.column_names == ["point", "t_s", "source", "name", "labels", "value"]
    assert [tuple(row.values()) for row in table.to_pylist()] == rows


# -- what is done to every worker before a load point


ADMIN = {"Authorization": "Bearer a"}


class Worker:
    """The endpoints that are asked; what was asked stands in ``seen``."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, object, str]] = []
        self.info: dict[str, object] = {}
        self.answers: dict[str, list[int]] = {}

    async def handle(self, request: web.Request) -> web.Response:
        if request.path == "/server_info":
            return web.json_response(self.info)
        body = await request.text()
        self.seen.append((request.path, json.loads(body) if body else None, request.headers.get("Authorization", "")))
        left = self.answers.get(request.path, [])
        return web.Response(status=left.pop(0) if len(left) > 1 else left[0] if left else 200, text="said\nso")

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()


async def reset(worker: Worker, name: str = "sglang") -> object:
    async with worker.listening() as url:
        with ThreadPoolExecutor(1) as pool:
            asked = Evidence(
                Deployment("1p1d", engine(name), 2, url, "", {"prefill-0": url}), {"Authorization": "Bearer k"}, ADMIN, pool
            )
            done: dict[str, object] = {}
            try:
                await asked.reset(done)
            finally:
                await asked.close()
    return done["prefill-0"]


async def test_every_worker_is_brought_to_its_starting_state() -> None:
    worker = Worker()
    assert await reset(worker) == {"full_speed": "ok", "profile": "unknown", "flush": "ok"}
    assert worker.seen == [
        ("/slow_down", {"forward_sleep_time": None}, "Bearer a"),
        ("/flush_cache", None, "Bearer a"),
    ]


async def test_a_profile_is_stopped_only_where_the_worker_says_that_one_runs() -> None:
    """SGLang does not say, answers an idle /stop_profile with an error, and may die of it: it is left alone."""
    worker = Worker()
    for info, came, asked in [
        ({}, "unknown", 0),
        ({"profiling": False}, "none", 0),
        ({"profiling": True}, "stopped", 1),
    ]:
        worker.info, worker.seen = dict(info), []
        steps = await reset(worker)
        assert isinstance(steps, dict)
        assert (steps["profile"], [path for path, _, _ in worker.seen].count("/stop_profile")) == (came, asked)


async def test_a_cache_is_emptied_as_soon_as_the_worker_is_idle() -> None:
    worker = Worker()
    worker.answers["/flush_cache"] = [400, 400, 200]
    assert await reset(worker) == {"full_speed": "ok", "profile": "unknown", "flush": "ok"}
    assert [path for path, _, _ in worker.seen].count("/flush_cache") == 3


async def test_what_a_worker_refuses_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "_IDLE_WITHIN_S", 0.3)
    worker = Worker()
    worker.info = {"profiling": True}
    worker.answers = {"/slow_down": [401], "/stop_profile": [500], "/flush_cache": [400]}
    assert await reset(worker) == {
        "full_speed": "HTTP 401: said so",
        "profile": "HTTP 500: said so",
        "flush": "HTTP 400: said so",
    }
    with ThreadPoolExecutor(1) as pool:
        gone = Evidence(
            Deployment("1p1d", engine("sglang"), 2, "http://x", "", {"prefill-0": "http://127.0.0.1:9"}), {}, {}, pool
        )
        done: dict[str, dict[str, str]] = {}
        await gone.reset(done)  # type: ignore[arg-type]
        await gone.close()
    assert done["prefill-0"]["full_speed"].startswith("ClientConnectorError: Cannot connect to host 127.0.0.1:9")
    assert done["prefill-0"]["flush"].startswith("ClientConnectorError")


async def test_an_engine_without_such_calls_is_not_asked() -> None:
    worker = Worker()
    assert await reset(worker, "vllm") == {}
    assert worker.seen == []


async def test_the_routers_metrics_and_this_hosts_are_recorded(tmp_path: Path) -> None:
    worker = Worker()

    async def page(request: web.Request) -> web.Response:
        return web.Response(
            text="# TYPE smg_pd_ttft_seconds histogram\nsmg_pd_ttft_seconds_sum 1.5\nsmg_pd_ttft_seconds_count 3\n"
        )

    app = web.Application()
    app.router.add_get("/metrics", page)
    runner = web.AppRunner(app)
    await runner.setup()
    async with worker.listening() as url:
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            metrics = f"http://127.0.0.1:{runner.addresses[0][1]}/metrics"
            with ThreadPoolExecutor(1) as pool:
                asked = Evidence(Deployment("agg", engine("sglang"), 1, url, metrics, {}), {}, {}, pool)
                side = await asked.snapshot(0.0)
                scraping = asyncio.create_task(asked.scrape(0, 0.0, 0.05))
                for _ in range(1000):
                    await asyncio.sleep(0.02)
                    if any(row[2].startswith("host:") for row in asked.rows):
                        break
                scraping.cancel()
                await asyncio.gather(scraping, return_exceptions=True)
                await asked.close()
        finally:
            await runner.cleanup()
    assert side["router"]["metrics"] == {"smg_pd_ttft_seconds_sum": 1.5, "smg_pd_ttft_seconds_count": 3.0}  # type: ignore[index]
    sources = {(source.partition(":")[0], name) for _, _, source, name, _, _ in asked.rows}
    assert {("router", "smg_pd_ttft_seconds_sum"), ("host", "node_cpu_seconds_total")} <= sources
