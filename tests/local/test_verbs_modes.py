"""The verbs in check mode, with a limit, on aggregated workers, and with -e purge=true."""

from __future__ import annotations

import json
import shutil

from local.conftest import REPO, Checkout

LOAD = ("-e", "bench_concurrency=4,8", "-e", "bench_num_requests=24", "-e", "bench_output_len=16")


def test_check_mode_is_truthful_and_touches_nothing(clean: Checkout) -> None:
    files = clean.files()
    foretold = clean.play("deploy_pd.yml", "--check", "--diff").good()
    assert all(count > 0 for count in foretold.changed.values())
    assert "would start pd-prefill-0" in foretold.text
    assert clean.processes() == []
    assert clean.files() - files <= {".pd", ".pd/deployed"}
    clean.play("deploy_pd.yml").good()
    before = clean.pids()
    assert clean.play("deploy_pd.yml", "--check").good().changed == {"gh200": 0, "a100": 0}
    foretold = clean.play("deploy_pd.yml", "--check", "-e", "ratio=2p2d").good()
    assert "would stop pd-prefill-2" in foretold.text
    assert "would start pd-decode-1" in foretold.text
    clean.play("teardown.yml", "--check").good()
    assert clean.pids() == before


def test_purge_removes_installs_and_compiled_kernels_and_a_teardown_shipped_files(clean: Checkout) -> None:
    jit, shipped = clean.folder / ".pd" / "jit", "tests/data/README.md"
    given = json.dumps({"cache_dir": str(jit), "engine_files": [shipped]})
    assert f"made {jit}" in clean.play("deploy_pd.yml", "-e", given).good().text
    for host in ("gh200", "a100"):
        sent = clean.state(host) / "files" / "README.md"
        assert sent.read_text() == (clean.folder / shipped).read_text()
    again = clean.play("deploy_pd.yml", "-e", given).good()
    assert again.changed == {"gh200": 0, "a100": 0}
    clean.play("teardown.yml").good()
    assert not sent.exists()
    assert jit.is_dir(), "compiled kernels stay without purge"
    # an install_dir of its own, so that the other tests keep theirs; it knows of the folder
    own = clean.folder / ".pd" / "purged"
    own.mkdir()
    (own / ".pd").write_text("Made by deploy_pd.yml; teardown.yml removes it.\n")
    shutil.move(REPO / ".pd" / "test" / "verbs" / "caches", own / "caches")
    clean.play("teardown.yml", "-e", "purge=true", "-e", f"install_dir={own}").good()
    assert not own.exists()
    assert not jit.exists()


def test_a_limit_does_not_pretend_to_change_what_it_leaves_out(clean: Checkout) -> None:
    clean.play("deploy_pd.yml").good()
    refused = clean.play("deploy_pd.yml", "-l", "a100", "-e", '{"engine_env": {"X": "1"}}')
    assert refused.code != 0
    assert "--limit leaves out gh200, and prefill-0 there would change: type -l gh200,a100" in " ".join(refused.text.split())
    # who holds the lock on the router's host is asked also where the limit leaves that out
    lock = clean.state("a100") / "lock.json"
    lock.write_text(json.dumps({"controller": "elsewhere", "pid": 1, "user": "bob", "verb": "bench", "since": 0}))
    busy = clean.play("teardown.yml", "-l", "gh200")
    assert busy.code != 0
    assert "being changed by bench of bob on elsewhere" in " ".join(busy.text.split())
    lock.unlink()
    # what a limited teardown stopped is no longer counted on
    clean.play("teardown.yml", "-l", "gh200").good()
    clean.play("deploy_pd.yml", "-l", "a100", "-e", "ratio=1p1d").good()
    assert sorted(clean.pids()) == ["pd-decode-0", "pd-prefill-0", "pd-router"]


def test_what_the_ratio_does_not_need_may_be_left_out(clean: Checkout) -> None:
    clean.play("deploy_pd.yml", "-l", "a100", "-e", "ratio=2p2d").good()
    assert sorted(clean.pids()) == ["pd-decode-0", "pd-decode-1", "pd-prefill-0", "pd-prefill-1", "pd-router"]


def test_aggregated_workers_under_a_load_in_stages(clean: Checkout) -> None:
    load = {"prefix_len": 16, "stages": [{"concurrency": 4}, {"batch": 6}]}
    clean.measured("-e", "ratio=2agg", "-e", json.dumps({"bench_load": load}), *LOAD[2:])
    points = json.loads((clean.folder / "results" / "latest" / "summary.json").read_text())["points"]
    assert [(p["concurrency"], p["num_requests"], p["shared_prefix"]) for p in points] == [(4, 24, True), (6, 6, True)]
    assert sorted(clean.pids()) == ["pd-aggregated-0", "pd-aggregated-1", "pd-router"]
