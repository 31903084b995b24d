"""The digesting process: reads what the senders spooled, and writes the journal. Parsing never delays a stamp."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from pdbench.records import MEASURE
from pdbench.run.digest import to_record
from pdbench.run.spool import Reader

#: different errors that are shown while the run goes on
_ERRORS_TOLD = 5
_IDLE_S = 0.05


@dataclass
class Totals:
    """What was digested so far; ``reads`` brought the output of the good measured requests of point ``point``."""

    failed: int = 0
    reads: int = 0
    cpu_s: float = 0.0
    errors: list[str] = field(default_factory=list)


def main(control: Connection, folder: Path, journal: Path, senders: int) -> None:
    """Digest until the session closes the pipe.

    It is told how many exchanges each sender has spooled, and answers with the totals since the last such answer once it
    has read as many.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    # On a small machine the senders' stamps come first.
    os.nice(5)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            _serve(control, [Reader(folder, number) for number in range(senders)], journal)
        except OSError as why:
            control.send(("fault", why))


def _serve(control: Connection, readers: list[Reader], journal: Path) -> None:
    totals, told, cpu = Totals(), (0, 0), time.process_time()
    seen: set[str] = set()
    wanted: list[int] | None = None
    with journal.open("a", encoding="utf-8") as lines:
        while True:
            for reader in readers:
                for raw in reader.read():
                    record, reads = to_record(raw)
                    lines.write(record.to_line())
                    if record.ok:
                        totals.reads += reads if record.phase == MEASURE else 0
                    else:
                        totals.failed += 1
                        if record.error not in seen and len(seen) < _ERRORS_TOLD:
                            seen.add(record.error)
                            totals.errors.append(record.error)
            lines.flush()
            if wanted is not None and all(r.count >= n for r, n in zip(readers, wanted, strict=True)):
                totals.cpu_s = time.process_time() - cpu
                control.send(("digested", totals))
                totals, told, cpu, wanted = Totals(), (0, 0), time.process_time(), None
            elif (totals.failed, len(totals.errors)) != told:
                told = (totals.failed, len(totals.errors))
                control.send(("failed", totals))
                totals.errors, told = [], (totals.failed, 0)
            if control.poll(_IDLE_S if wanted is None else 0.005):
                wanted = control.recv()
