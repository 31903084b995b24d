"""What `profile.yml` asks for, and what it refuses before a host is contacted."""

from __future__ import annotations

import gzip
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from pdlib import profile_spec, traces
from pdlib.errors import UserError
from pdlib.variables import VARIABLES


def plan(**changes: Any) -> dict[str, Any]:
    def worker(role: str, host: str, gpus: list[int], env: dict[str, str]) -> dict[str, Any]:
        return {
            "name": f"{role}-0",
            "role": role,
            "ranks": [{"host": host, "gpus": gpus, "env": env, "unit": f"pd-{role}-0.service"}],
        }

    made = {"engine": "sglang", "ratio": "1p1d", "emulated": False}
    made["workers"] = [worker("prefill", "n1", [0], {}), worker("decode", "n2", [0, 1], {})]
    return {**made, **changes}


def cluster(**changes: Any) -> dict[str, Any]:
    return {name: row.default for name, row in VARIABLES.items()} | {"role": "decode"} | changes


BENCH = {
    "run_id": "20260101-000000-1p1d",
    "results_dir": "results",
    "clients": {"c": {"argv": ["py", "-m", "pdbench", "run", "--url", "u"], "selfcheck": ["x"], "after": ["y"]}},
}


def test_the_load_is_sent_by_pdbench_profile() -> None:
    made = profile_spec.make(BENCH, plan(), cluster(profile_batch=64))
    (client,) = made["clients"].values()
    assert client["argv"][3] == "profile"
    assert client["argv"][client["argv"].index("--decode-batch") + 1] == "64"
    assert client["argv"][client["argv"].index("--activities") + 1] == "CPU,GPU"
    assert client["selfcheck"] == client["after"] == []
    assert made["run_id"] == "profile-20260101-000000-1p1d-decode"
    assert made["traces"] == {"n2": {"pd-decode-0": 2}}
    assert BENCH["clients"]["c"]["argv"][3] == "run"  # type: ignore[index]


@pytest.mark.parametrize(
    ("made", "given", "said"),
    [
        ({}, {"role": None}, "-e role=prefill"),
        ({"engine": "vllm"}, {}, "engine vllm has not"),
        ({"ratio": "2agg", "workers": []}, {}, "the ratio 2agg has no decode worker"),
        ({}, {"bench_concurrency": [1, 2]}, "make 2"),
        ({}, {"bench_output_len": "10"}, "bench_output_len=10"),
    ],
)
def test_what_cannot_be_profiled_is_refused(made: dict[str, Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        profile_spec.check(plan(**made), cluster(**given))


def test_an_engine_that_would_die_is_refused() -> None:
    made = plan()
    made["workers"][1]["ranks"][0]["env"] = {"SGLANG_PROFILE_V2": "1"}
    with pytest.raises(UserError, match="SGLANG_PROFILE_V2"):
        profile_spec.check(made, cluster())


def test_traces_are_waited_for_packed_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "STEP_S", 0.0)
    state = str(tmp_path)
    (tmp_path / "run" / "pd-decode-0").mkdir(parents=True)
    traces.prepare(state, ["pd-decode-0"], "old", "")
    assert "removed profile old" in traces.prepare(state, ["pd-decode-0"], "p", "")
    place = traces.folder(state, "pd-decode-0", "p")
    assert traces.collect(state, {"pd-decode-0": 2}, "p").message == "pd-decode-0 has written 0 of 2 traces"
    whole = gzip.compress(b"x" * 100)
    for number, content in enumerate((whole, whole[:-4])):
        (place / f"p-TP-{number}.trace.json.gz").write_bytes(content)
    old = time.time() - 60
    for path in place.iterdir():
        os.utime(path, (old, old))
    # The second is still being written.
    assert not traces.collect(state, {"pd-decode-0": 2}, "p").done
    (place / "p-TP-1.trace.json.gz").write_bytes(whole)
    os.utime(place / "p-TP-1.trace.json.gz", (old, old))
    assert traces.collect(state, {"pd-decode-0": 2}, "p").done
    traces.pack(state, "p", str(tmp_path / "a.tar.gz"))
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        assert sorted(tar.getnames()) == [f"p/traces/decode-0/p-TP-{n}.trace.json.gz" for n in (0, 1)]
    traces.drop(state, "p")
    assert not place.exists()
