"""What a bare aiohttp client on uvloop costs: one shared session, nothing but the request, the stamps and the means.

    floor.py parse|raw URL CONCURRENCY REQUESTS OUT

``parse`` reads lines and loads the JSON of each event; ``raw`` stamps every read, and counts its events when the run is over.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np
import uvloop

MODE, URL, CONCURRENCY, REQUESTS, OUT = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
BODY = {"model": "m", "prompt": "x " * 64, "max_tokens": 128, "stream": True}


async def stamps(session: aiohttp.ClientSession) -> list[float]:
    """Send one request; return when it was sent, and when each event came, seconds."""
    times = [time.perf_counter()]
    async with session.post(URL + "/v1/completions", json=BODY) as answer:
        if MODE == "parse":
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    now, event = time.perf_counter(), json.loads(line[6:])
                    times += [now] if event["choices"] and event["choices"][0]["text"] else []
            return times
        reads = [(time.perf_counter(), data) async for data in answer.content.iter_any()]
    return times + [when for when, data in reads for _ in range(data.count(b"data: {"))]


async def main() -> None:
    """Send all requests, and write the figures."""
    free = asyncio.Semaphore(CONCURRENCY)
    connector, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=patience) as session:

        async def one() -> list[float]:
            async with free:
                return await stamps(session)

        start = time.perf_counter()
        all_stamps = await asyncio.gather(*[one() for _ in range(REQUESTS)])
        took = time.perf_counter() - start
    ttft = [1e3 * (t[1] - t[0]) for t in all_stamps]
    itl = [1e3 * (t[-1] - t[1]) / (len(t) - 2) for t in all_stamps]
    figures = {"completed": REQUESTS, "duration": took}
    for name, values in (("ttft", ttft), ("itl", itl)):
        figures |= {f"mean_{name}_ms": float(np.mean(values)), f"p99_{name}_ms": float(np.percentile(values, 99))}
    OUT.write_text(json.dumps(figures))


uvloop.run(main())
