"""What goes on beside a test's own steps. It needs nothing but Python: `python -m lab` has no more on its path."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(call: Callable[[], None], pause_s: float, last_s: float = 40.0) -> Iterator[None]:
    """Call again and again from a thread, with a pause before each, for as long as the block lasts.

    The call that is under way when the block ends has `last_s` to come to its end; one that raises was the last.
    """
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(pause_s):
            call()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(last_s)
