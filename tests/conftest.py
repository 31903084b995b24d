"""The order of test files: long ones first, so that no worker is left alone with one at the end (`make test` runs three)."""

from __future__ import annotations

import pytest
from hypothesis import settings

# No time limit for an example: the cores are shared. Fewer examples than the default of 100, in many runs.
settings.register_profile("pd", deadline=None, max_examples=50)
settings.load_profile("pd")

#: Files of over half a minute, longest first; each is one worker's from its first test to its last.
LONG = (
    "local/test_verbs_deploy.py", "local/test_verbs_bench.py", "local/test_bad_input.py", "unit/test_scenarios.py",
    "local/test_run_point.py",
)  # fmt: skip


def _place(item: pytest.Item) -> int:
    name = "/".join(item.path.parts[-2:])
    return LONG.index(name) if name in LONG else len(LONG)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file; the order within a file stays."""
    items.sort(key=_place)
