"""The two loops: how many are in flight, and that an open loop waits for nobody."""

from __future__ import annotations

import asyncio
from time import perf_counter

import pytest

from pdbench.load.requests import Request
from pdbench.run.loops import closed_loop, open_loop
from pdbench.run.point import until


def requests(count: int, gap: float | None = None) -> list[Request]:
    return [Request(i, 1, 1, None if gap is None else i * gap) for i in range(count)]


@pytest.mark.parametrize(("count", "slots"), [(10, 3), (2, 5), (1, 1), (0, 4)])
async def test_a_closed_loop_fills_its_slots_and_never_more(count: int, slots: int) -> None:
    running = most = 0
    order: list[int] = []

    async def send(request: Request, wanted: float) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        order.append(request.index)
        await asyncio.sleep(0.001 * (request.index % 3))
        running -= 1

    await closed_loop(requests(count), slots, send)
    assert order == list(range(count))
    assert most == min(slots, count)


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    release = asyncio.Event()
    sent: list[tuple[float, float]] = []

    async def send(request: Request, wanted: float) -> None:
        sent.append((wanted, perf_counter()))
        if len(sent) == 8:
            release.set()  # only when all are in flight does any get its answer
        await release.wait()

    start = perf_counter()
    async with asyncio.timeout(20):
        await open_loop(requests(8, 0.01), send)
    assert [round(wanted - sent[0][0], 6) for wanted, _ in sent] == [round(i * 0.01, 6) for i in range(8)]
    assert all(at >= wanted for wanted, at in sent)
    assert sent[0][0] >= start


async def test_stop_cancels_what_is_in_flight() -> None:
    stop, cancelled = asyncio.Event(), []

    async def send(request: Request, wanted: float) -> None:
        stop.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(request.index)
            raise

    assert await until(stop, closed_loop(requests(5), 2, send)) is False
    assert sorted(cancelled) == [0, 1]
    assert await until(asyncio.Event(), closed_loop([], 2, send)) is True
