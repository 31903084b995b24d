"""The shipped sweeps of one host, rehearsed to their reports; that of two hosts is in test_sweep_plays.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from local.conftest import Checkout
from local.sweeping import rehearsed

#: file and inventory -> the ratios that its report must have, of which some were added as baselines
SHIPPED = {"h200x8-ratios": {"3p1d", "2p2d", "1p3d", "4agg"}, "vllm-xpyd": {"agg", "1p1d", "2agg"}}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_is_rehearsed_to_its_report(checkout: Checkout, name: str, tmp_path: Path) -> None:
    inventory = f"inventory/{name.removesuffix('-ratios')}"
    rehearsed(checkout, name, inventory, SHIPPED[name], len(SHIPPED[name]), tmp_path / "log")
