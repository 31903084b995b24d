"""The order of test files: long ones first, so that no worker is left alone with one at the end (`make test` runs three)."""

from __future__ import annotations

import pytest

#: Files of over half a minute, longest first; each is one worker's from its first test to its last.
LONG = (
    "test_verbs_deploy.py", "test_verbs_bench.py", "test_bad_input.py", "test_weights.py", "test_verbs_doctor.py",
    "test_gate_faults.py", "test_scenarios.py", "test_run_point.py", "test_other_routers.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file; the order within a file stays."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
