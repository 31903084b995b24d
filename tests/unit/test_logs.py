"""Logs that go on from one process of a unit to the next: what the last one said, and the lines that a run keeps."""

from __future__ import annotations

from pdlib.managers import matching, since_start
from pdlib.units import STARTED

OLD = f"{STARTED} 2026-01-01T00:00:00Z\nUsing TCP transport (no HCA detected)\nserving\n"
NEW = f"{STARTED} 2026-01-01T01:00:00Z\nhello\nUsing Intra-Node NVLink transport\nPOST /generate 200\n"


def test_lines_are_kept_wherever_they_stand_but_only_the_last_process_s() -> None:
    log = (OLD + NEW + "POST /generate 200\n" * 1000).splitlines(keepends=True)
    assert matching(log, r"Using [\w -]+ transport", 40) == "Using Intra-Node NVLink transport"
    assert matching(log, "POST", 2) == "POST /generate 200\nPOST /generate 200"
    assert matching(log, "hello", 40, follow=2) == "hello\nUsing Intra-Node NVLink transport\nPOST /generate 200"
    later = (OLD + NEW + f"{STARTED} 2026-01-01T02:00:00Z\nserving\n").splitlines(keepends=True)
    assert matching(later, "transport", 40, follow=5) == ""


def test_the_end_of_a_log_is_the_last_process_s() -> None:
    assert since_start(OLD + NEW) == NEW
    assert since_start("the end of a long log\n") == "the end of a long log\n"
    quoted = f'{OLD}"{STARTED}" is the mark\n'
    assert since_start(quoted) == quoted
