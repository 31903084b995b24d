"""Folders of compiled kernels: made for who runs the engine, removed by a purge, and nobody else's."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from unit.plans import Json, host, plan
from unit.test_reconcile import B, home, unit

from pdlib import accounts, caches, units
from pdlib.errors import UserError
from pdlib.folders import claim
from pdlib.reconcile import Reconciler
from pdlib.teardown import remove_everything

__all__ = ["home"]
SOMEBODY = "nobody"


@pytest.fixture
def install(tmp_path: Path) -> Path:
    claim(str(tmp_path / "install"))
    return tmp_path / "install"


def test_a_folder_that_is_not_there_is_made_once_and_a_purge_removes_it(tmp_path: Path, install: Path) -> None:
    folder = tmp_path / "deep" / "jit"
    assert caches.make(str(folder), str(install), "") is True
    assert caches.make(str(folder), str(install), "") is False
    (folder / "deep_gemm").mkdir()
    (folder / "deep_gemm" / "kernel.cubin").write_text("x")
    assert caches.remove(str(install), check=True) == [f"removed {folder}"]
    assert (folder / "deep_gemm" / "kernel.cubin").exists()
    assert caches.remove(str(install), check=False) == [f"removed {folder}"]
    assert not folder.exists()
    assert caches.remove(str(install), check=False) == []


def test_a_folder_that_was_there_is_used_and_stays(tmp_path: Path, install: Path) -> None:
    folder = tmp_path / "jit"
    folder.mkdir()
    assert caches.make(str(folder), str(install), "") is False
    assert list(folder.iterdir()) == []
    assert caches.remove(str(install), check=False) == []
    # nor does a note that outlived its folder say anything of another one in its place
    ours = tmp_path / "ours"
    caches.make(str(ours), str(install), "")
    (ours / ".pd").unlink()
    assert caches.remove(str(install), check=False) == []
    assert ours.exists()


def test_weights_that_an_engine_put_there_outlive_a_purge(tmp_path: Path, install: Path) -> None:
    folder = tmp_path / "cache"
    caches.make(str(folder), str(install), "")
    (folder / "hub" / "m").mkdir(parents=True)
    (folder / "hub" / "m" / "model-00001.safetensors").write_text("weights")
    said = [f"kept {folder}: it holds model weights (hub/m/model-00001.safetensors)"]
    assert caches.remove(str(install), check=True) == said
    assert caches.remove(str(install), check=False) == said
    assert (folder / "hub" / "m" / "model-00001.safetensors").read_text() == "weights"


def test_what_cannot_be_made_is_said_by_its_variable(tmp_path: Path, install: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"cannot make cache_dir={tmp_path}/file/jit: .*set cache_dir"):
        caches.make(f"{tmp_path}/file/jit", str(install), "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_it_belongs_to_who_runs_the_engine_also_after_a_change_of_runtime(tmp_path: Path, install: Path) -> None:
    entry = pwd.getpwnam(SOMEBODY)
    folder = tmp_path / "jit"
    caches.make(str(folder), str(install), SOMEBODY)
    assert folder.stat().st_uid == entry.pw_uid
    # a container's engine is root, and its successor in a virtualenv is not
    os.chown(folder, 0, 0)
    (folder / "triton").mkdir()
    (folder / "triton" / "kernel").write_text("x")
    (folder / "link").symlink_to("/etc/hostname")
    before = os.stat("/etc/hostname").st_uid
    assert caches.make(str(folder), str(install), SOMEBODY) is False
    assert {path.lstat().st_uid for path in [folder, *folder.rglob("*")]} == {entry.pw_uid}
    assert os.stat("/etc/hostname").st_uid == before
    # one that was there is as its owner left it
    other = tmp_path / "other"
    other.mkdir()
    caches.make(str(other), str(install), SOMEBODY)
    assert other.stat().st_uid == os.geteuid()


def test_workers_find_it_made_and_only_a_purge_removes_it(home: Path, install: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owned: list[str] = []
    monkeypatch.setattr(accounts, "own_tree", lambda path, name: owned.append(name))
    folder, worker = home.parent / "jit", unit("pd-prefill-0", "a", user="pd")

    def changed(*wanted: Json, check: bool = False) -> list[str]:
        return Reconciler(str(home), str(install), "supervisord", "1p1d", wanted, check).step(False).changed

    assert changed(worker, B)
    with_cache = {**worker, "cache_dir": str(folder)}
    # a folder to be made is no reason to restart a worker
    assert changed(with_cache, B, check=True) == [f"would make {folder}"]
    assert not folder.exists()
    assert changed(with_cache, B) == [f"made {folder}"]
    assert changed(with_cache, B) == changed(with_cache, B, check=True) == []
    assert owned == [], "under supervisord units run as who deploys"
    kept = remove_everything(str(home), str(install), ["supervisord"], False, False)
    assert f"removed {home}" in kept.changed
    assert folder.exists()
    purged = remove_everything(str(home), str(install), ["supervisord"], True, False)
    assert purged.changed == [f"removed {folder}", f"removed {install}"]
    assert not folder.exists()


def test_every_worker_of_a_host_that_names_one_has_it_also_in_a_container() -> None:
    own = {"runtime": "docker", "engine_image": f"lmsysorg/sglang:v0.5.23@sha256:{'0a' * 32}", "service_manager": "systemd"}
    hosts = {
        "n1": host(1, cache_dir="/srv/jit", **own),
        "n2": host(2, cache_dir="/srv/jit", service_manager="systemd"),
        "n3": host(3),
    }
    for engine, image in (("sglang", own["engine_image"]), ("vllm", f"vllm/vllm-openai:v0.33.0@sha256:{'0b' * 32}")):
        hosts["n1"]["engine_image"] = image
        more = {"router": "vllm-router"} if engine == "vllm" else {}
        made = plan(hosts, "3agg", engine=engine, model="m", tensor_parallel_size=4, **more)
        (inside,), (outside,), (without,) = (
            [row for row in units.host_units(made, name) if row["name"] != "pd-router"] for name in hosts
        )
        assert [row["cache_dir"] for row in (inside, outside, without)] == ["/srv/jit", "/srv/jit", None]
        # who it is given to
        assert [row["user"] for row in (inside, outside)] == ["root", "pd"]
        # the whole of it: FlashInfer adds a folder of its own beside those that are named
        assert "type=bind,source=/srv/jit,target=/srv/jit" in inside["argv"]
        assert "cache_dir" not in next(row for row in units.host_units(made, "n1") if row["name"] == "pd-router")
