"""What steers a profile when the load ends at a bad moment."""

from __future__ import annotations

import asyncio

from aiohttp import web

from pdbench.profiling.steer import Steering, Wish
from pdbench.profiling.targets import Target


def test_a_worker_that_begins_to_record_as_the_load_ends_is_stopped() -> None:
    """Its answer comes after the load is over: nobody may leave it recording."""
    asked: list[str] = []

    async def profile() -> Steering:
        begun = asyncio.Event()

        async def loads(request: web.Request) -> web.Response:
            assert request.headers["Authorization"] == "Bearer k"
            return web.json_response({"loads": [{"num_running_reqs": 1, "num_waiting_reqs": 2}]})

        async def start(request: web.Request) -> web.Response:
            assert request.headers["Authorization"] == "Bearer a"
            begun.set()
            await asyncio.sleep(0.3)
            asked.append("started")
            return web.Response()

        async def stop(request: web.Request) -> web.Response:
            assert request.headers["Authorization"] == "Bearer a"
            asked.append("stopped")
            return web.Response()

        app = web.Application()
        app.add_routes([web.get("/v1/loads", loads), web.post("/start_profile", start), web.post("/stop_profile", stop)])
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            wish = Wish("prefill", "p", 2, 0.0, None, 10.0, ("CPU",), False, 10, 3)
            steering = Steering(
                (Target("prefill-0", url, "x", 1, "prefill-0"),),
                wish,
                {"Authorization": "Bearer k"},
                {"Authorization": "Bearer a"},
                None,
            )
            await steering.before()
            visit = asyncio.create_task(steering.during())
            await asyncio.wait_for(begun.wait(), 10)
            visit.cancel()
            await asyncio.gather(visit, return_exceptions=True)
            await steering.after()
            return steering
        finally:
            await runner.cleanup()

    outcome = asyncio.run(profile()).outcome
    assert asked == ["started", "stopped"]
    assert outcome.started == outcome.cut_short == ["prefill-0"]
    assert outcome.problems == []
