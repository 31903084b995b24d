"""`bench.yml -e ratio=auto`: advised, the best two measured, and said which won."""

from __future__ import annotations

import json

from local.conftest import Checkout

#: Two GPUs a host: fewer ratios to predict, and workers to start. The client's delay on a busy machine is not what is tested.
LOAD = [
    *("-e", "gpus=2", "-e", "bench_concurrency=6", "-e", "bench_num_requests=40", "-e", "bench_output_len=16"),
    *("-e", "bench_selfcheck=false", "-e", "bench_max_client_delay_ms=5000"),
]


def test_the_best_two_are_measured_and_compared(clean: Checkout) -> None:
    done = clean.play("bench.yml", "-e", "ratio=auto", *LOAD, timeout=1500).good()
    (folder,) = (clean.folder / "results").glob("auto-*")
    (point,) = json.loads((folder / "advice.json").read_text())["points"]
    two = [one["ratio"] for one in point["ratios"][:2]]
    found = json.loads((folder / "check.json").read_text())
    assert {cell["ratio"] for cell in found["cells"]} == set(two)
    assert all(cell["runs"] == 3 for cell in found["cells"])
    assert found["throughput_error"] < 0.5, "the emulator follows the model"
    assert "predicted and measured" in done.text
    assert "measured best by output_throughput per GPU" in done.text or "was shown: take either" in done.text


def test_a_profile_that_is_missing_or_wrong_is_said_before_anything_is_deployed(clean: Checkout) -> None:
    done = clean.play("bench.yml", "-e", "ratio=auto", "-e", "advise_profile=tinny")
    assert done.code != 0
    assert "did you mean tiny" in done.text
    assert clean.processes() == []
