"""Many simulations at once, on all cores."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")
#: what all jobs of a process share; big, so sent once
_shared: list[Any] = []


def _begin(shared: object) -> None:
    _shared[:] = [shared]
    gc.disable()


def _call(job: tuple[Callable[[Any, Any], Any], Any]) -> Any:
    function, task = job
    try:
        return function(_shared[0], task)
    finally:
        gc.collect()  # once a job: a simulation makes millions of objects, and nothing of it can go before its end


@contextmanager
def pool(
    shared: object, processes: int | None = None
) -> Iterator[Callable[[Callable[[Any, _In], _Out], Sequence[_In]], list[_Out]]]:
    """Give a function that calls ``function(shared, task)`` for every task and returns the results in their order.

    ``processes``: as many as there are cores by default; with one, everything happens here. Functions are module-level ones.
    """
    count = processes or len(os.sched_getaffinity(0))

    def here(function: Callable[[Any, _In], _Out], tasks: Sequence[_In]) -> list[_Out]:
        return [function(shared, task) for task in tasks]

    if count == 1:
        yield here
        return
    executor = ProcessPoolExecutor(count, initializer=_begin, initargs=(shared,))

    def spread(function: Callable[[Any, _In], _Out], tasks: Sequence[_In]) -> list[_Out]:
        return list(executor.map(_call, [(function, task) for task in tasks]))

    try:
        yield spread
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
