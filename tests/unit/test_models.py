"""Models: where they lie, whether they are whole, and copies of them that are whole or not there."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.plans import host, plan

from pdlib import model_host, model_tool, models, processes
from pdlib.errors import UserError
from pdlib.steps import Outcome

Json = dict[str, Any]
DIGESTS = st.sampled_from(["", "aa", "bb"])

# ---------------------------------------------------------------- where


@pytest.mark.parametrize(
    ("model", "source", "revision", "path"),
    [
        ("Qwen/Qwen2.5-3B", "path", None, "Qwen/Qwen2.5-3B"),
        ("/srv/m", "path", None, "/srv/m"),
        ("/srv/m/", "rsync", None, "/srv/m"),
        ("Qwen/Qwen2.5-3B", "hub", None, "/models/Qwen--Qwen2.5-3B"),
        ("Qwen/Qwen2.5-3B", "rsync", "v1", "/models/Qwen--Qwen2.5-3B@v1"),
        ("gpt2", "hub", "refs/pr/1", "/models/gpt2@refs--pr--1"),
    ],
)
def test_where_a_model_lies(model: str, source: str, revision: str | None, path: str) -> None:
    assert models.location(model, source, "/models/", revision) == path


@pytest.mark.parametrize(
    ("model", "source", "part"), [("/srv/m", "hub", "is a path"), ("../x", "hub", "neither"), ("a/b/c", "rsync", "neither")]
)
def test_a_model_that_cannot_be_found_there_is_refused(model: str, source: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        models.location(model, source, "/models")


def test_switching_the_model_is_one_variable() -> None:
    made = [plan({"n1": host(1)}, "agg", engine="sglang", model=m, model_source="hub", model_dir="/m") for m in ("a/b", "c/d")]
    for row, (path, name) in zip(made, [("/m/a--b", "a/b"), ("/m/c--d", "c/d")], strict=True):
        argv = row["workers"][0]["ranks"][0]["argv"]
        assert argv[argv.index("--model-path") + 1] == path
        # clients ask for the name that they know, wherever hosts keep it
        assert argv[argv.index("--served-model-name") + 1] == row["served_model_name"] == name
        assert row["hosts"]["n1"]["model"] == {"path": path, "name": name, "source": "hub", "dir": "/m"}
        assert "hub" in [install["name"] for install in row["hosts"]["n1"]["installs"]]


def test_a_path_that_the_host_has_not_is_refused_before_anything_starts() -> None:
    given_: Json = {"engine": "sglang", "model": "/srv/m"}
    with pytest.raises(UserError, match=r"host n1: model=/srv/m is not there, and model_source is path"):
        plan({"n1": host(1)}, "agg", discovered={"n1": {"model": False}}, **given_)
    plan({"n1": host(1)}, "agg", discovered={"n1": {"model": True}}, **given_)
    plan({"n1": host(1)}, "agg", discovered={"n1": {"model": False}}, model_source="rsync", **given_)


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.sampled_from(["", "is not there"]), DIGESTS)), DIGESTS)
def test_who_gives_a_model_to_whom(rows: dict[str, tuple[str, str]], digest: str) -> None:
    wanted = digest or None
    found = {name: {"problem": problem, "digest": digest_} for name, (problem, digest_) in rows.items()}
    able = [name for name, row in found.items() if not row["problem"] and wanted in (None, row["digest"])]
    if not able:
        with pytest.raises(UserError, match="is on none of the hosts"):
            models.choose(found, wanted, "m")
        return
    giver, lacking = models.choose(found, wanted, "m")
    same = {name for name, row in found.items() if not row["problem"] and row["digest"] == found[able[0]]["digest"]}
    assert set(lacking) == set(found) - same
    assert giver == (able[0] if lacking else "")


# ---------------------------------------------------------------- whole or not


def weights(path: Path, count: int) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(i * 7 % 251 for i in range(count)))


def make_model(root: Path, size: int = 300_000) -> Path:
    (root / "sub dir").mkdir(parents=True)
    weights(root / "model-00001-of-00002.safetensors", size)
    weights(root / "model-00002-of-00002.safetensors", 10)
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (root / "config.json").write_text("{}")
    (root / "sub dir" / "ünï.txt").write_text("x\n")
    (root / "empty").touch()
    (root / ".cache").mkdir()
    (root / ".cache" / "junk").write_text("not part of it")
    return root


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


FAULTS: list[tuple[str, Any]] = [
    ("", lambda root: None),
    ("", lambda root: (root / "sub dir" / "ünï.txt").unlink()),
    ("is not there", shutil.rmtree),
    ("has no config.json", lambda root: (root / "config.json").unlink()),
    ("lacks 1 of 2 files of weights, such as model-00002", lambda root: (root / "model-00002-of-00002.safetensors").unlink()),
    ("model-00001-of-00002.safetensors that is cut off", lambda root: cut(root / "model-00001-of-00002.safetensors", 4000)),
    ("model-00001-of-00002.safetensors that is cut off", lambda root: cut(root / "model-00001-of-00002.safetensors", 3)),
    ("index.json that cannot be read", lambda root: cut(root / "model.safetensors.index.json", 5)),
]


@pytest.mark.parametrize(("part", "spoil"), FAULTS)
def test_a_model_that_is_not_whole_is_seen_without_reading_it(tmp_path: Path, part: str, spoil: Any) -> None:
    root = make_model(tmp_path / "m")
    spoil(root)
    found = model_tool.fault(root)
    assert part in found
    assert bool(part) == bool(found)


def quiet(folder: Path) -> model_tool.Progress:
    return model_tool.Progress(str(folder / "progress.json"), "hashing")


SHELL = "find . -type f -not -path './.*' -print0 | LC_ALL=C sort -z | xargs -0 -r sha256sum | sha256sum | cut -c1-64"


@given(
    st.dictionaries(st.from_regex(r"[a-zA-Zé0-9_ +-]{1,6}(/[a-z_]{1,4})?", fullmatch=True), st.binary(max_size=40), max_size=6)
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_checksum_is_what_a_person_gets_in_a_shell(tmp_path: Path, files: dict[str, bytes]) -> None:
    root = tmp_path / "m"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in files.items():
        path = root / name
        if not path.parent.is_file() and not path.is_dir():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    made = model_tool.make_manifest(root, tmp_path / "m.pd.json", quiet(tmp_path))
    typed = subprocess.run(["sh", "-c", SHELL], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    assert made["digest"] == typed
    assert model_tool.known(root, made)


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    root, manifest = make_model(tmp_path / "m"), tmp_path / "m.pd.json"
    first = model_tool.make_manifest(root, manifest, quiet(tmp_path))
    again = quiet(tmp_path)
    assert model_tool.make_manifest(root, manifest, again) == first
    assert again.done == 0
    (root / "config.json").write_text("{ }")
    assert not model_tool.known(root, first)
    changed = quiet(tmp_path)
    assert model_tool.make_manifest(root, manifest, changed)["digest"] != first["digest"]
    assert changed.done == 3


# ---------------------------------------------------------------- from host to host


class Giver:
    """A model that is served in this process."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.root = make_model(folder / "m")
        manifest = model_tool.make_manifest(self.root, folder / "m.pd.json", quiet(folder))
        self.server = model_tool._Server("127.0.0.1", "tok", self.root, manifest)
        self.digest = manifest["digest"]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def task(self, path: Path, **more: Any) -> Json:
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        base = {"path": str(path), "manifest": f"{path}.pd.json", "url": url, "digest": self.digest, "token": "tok", "from": "n1"}
        return {**base, **more}


@pytest.fixture
def giver(tmp_path: Path) -> Iterator[Giver]:
    made = Giver(tmp_path / "giver")
    yield made
    made.server.shutdown()
    made.server.server_close()


def contents(root: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in model_tool.files_of(root).items()}


def test_a_copy_is_the_same_and_nothing_else_is_left(giver: Giver, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "m"
    result = model_tool.fetch(giver.task(target), quiet(tmp_path))
    assert contents(target) == contents(giver.root)
    assert (result["digest"], result["changed"]) == (giver.digest, True)
    assert sorted(path.name for path in target.parent.iterdir()) == ["m", "m.pd.json"]
    assert model_tool.known(target, model_tool.read_json(target.with_name("m.pd.json")))
    assert model_tool.fetch(giver.task(target), quiet(tmp_path))["changed"] is False


BIG = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("kind", ["begun", "all there", "too long", "wrong from the start"])
def test_a_copy_goes_on_where_it_ended_and_trusts_nothing(giver: Giver, tmp_path: Path, kind: str) -> None:
    whole = (giver.root / BIG).read_bytes()
    part = tmp_path / "m.part" / BIG
    part.parent.mkdir()
    begun = {"begun": whole[:123_456], "all there": whole, "too long": whole + b"x", "wrong from the start": b"?" * 1000}[kind]
    part.write_bytes(begun)
    said = quiet(tmp_path)
    model_tool.fetch(giver.task(tmp_path / "m"), said)
    assert contents(tmp_path / "m") == contents(giver.root)


def test_what_is_there_is_kept_and_what_differs_is_refused(giver: Giver, tmp_path: Path) -> None:
    target = tmp_path / "m"
    shutil.copytree(giver.root, target)
    (target / BIG).unlink()
    kept = (target / "config.json").stat().st_ino
    assert model_tool.fetch(giver.task(target), quiet(tmp_path))["changed"]
    assert contents(target) == contents(giver.root)
    assert (target / "config.json").stat().st_ino == kept

    for name, content in (("config.json", b"{}!"), ("config.json", b"!!"), ("more.txt", b"")):
        shutil.rmtree(target)
        shutil.copytree(giver.root, target)
        (target / name).write_bytes(content)
        before = contents(target)
        with pytest.raises(model_tool.Refused, match=rf"another model than n1.*{name}.*overwrite no weights"):
            model_tool.fetch(giver.task(target), quiet(tmp_path))
        assert contents(target) == before


def test_nothing_is_written_where_there_is_no_room(giver: Giver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200_000))
    with pytest.raises(model_tool.Refused, match=r"needs 0\.00 GB more, and 0\.00 GB are free there; nothing was written"):
        model_tool.fetch(giver.task(tmp_path / "x" / "m"), quiet(tmp_path))
    assert not list((tmp_path / "x").iterdir())


def test_without_the_token_nothing_is_given(giver: Giver, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="403"):
        model_tool.fetch(giver.task(tmp_path / "m", token="guess"), quiet(tmp_path))
    with pytest.raises(model_tool.Refused, match="gives another model"):
        model_tool.fetch(giver.task(tmp_path / "m", digest="other"), quiet(tmp_path))
    for name in ("../giver/m.pd.json", ".cache/junk", "nothing"):
        with pytest.raises(OSError, match="404"):
            model_tool._get(giver.task(tmp_path / "m"), name, 0)


def test_hosts_that_share_the_folder_write_it_once(giver: Giver, tmp_path: Path) -> None:
    results: list[Json] = []

    def one(number: int) -> None:
        (tmp_path / str(number)).mkdir()
        results.append(model_tool.fetch(giver.task(tmp_path / "m"), quiet(tmp_path / str(number))))

    # POSIX locks are held by processes: another one has it first.
    hold = "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); print('held',flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "m.part.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        thread = threading.Thread(target=one, args=(1,))
        thread.start()
        end = time.monotonic() + 30
        while "waits" not in str(model_tool.read_json(tmp_path / "1" / "progress.json")) and time.monotonic() < end:
            time.sleep(0.05)
        assert not (tmp_path / "m").exists()
        holder.communicate("")
    thread.join(60)
    assert [row["changed"] for row in results] == [True]
    one(2)
    assert [row["changed"] for row in results] == [True, False]


# ---------------------------------------------------------------- the program, as hosts run it


class Host:
    """One host's side of it, with a state directory of its own."""

    def __init__(self, folder: Path, name: str):
        self.model = model_host.Model(str(folder / name / "models" / "m"), "a/m", str(folder / name / "state"))
        self.source: Json = {"kind": "rsync", "sha256": None, "revision": None, "endpoint": None, "token": ""}
        self.source["python"] = sys.executable

    def have(self, check: bool = False, **more: Any) -> tuple[Outcome, Json]:
        return finish(lambda: model_host.have(self.model, {**self.source, **more}, check))


def finish(call: Any) -> tuple[Outcome, Json]:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        outcome, more = call()
        if outcome.done:
            return outcome, more
    raise AssertionError("it never ended")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    both = Host(tmp_path, "n1"), Host(tmp_path, "n2")
    make_model(both[0].model.root)
    yield both
    for one in both:
        one.model.stop()


def test_from_one_host_to_the_other(pair: tuple[Host, Host]) -> None:
    one, two = pair
    assert one.have(check=True)[0].changed == ["would make the checksums of a/m"]
    outcome, has = one.have()
    assert (outcome.changed, has["problem"]) == (["made the checksums of a/m"], "")
    assert one.have()[0].changed == []
    assert two.have()[1] == {"problem": "is not there", "digest": "", "bytes": 0}

    token = "a-token-that-shows-nowhere"
    _, served = finish(lambda: model_host.serve(one.model, "127.0.0.1", token, 60, sys.executable, ""))
    assert served["digest"] == has["digest"]
    assert not [p for p in processes.all_processes() if token in p.command]

    def fetch(check: bool = False) -> Any:
        return model_host.fetch(two.model, served, token, "n1", has["bytes"], sys.executable, check)

    assert fetch(check=True)[0].changed == ["would copy a/m (0.00 GB) from n1"]
    assert not two.model.root.parent.exists()
    assert finish(fetch)[0].changed == ["copied a/m (0.00 GB) from n1"]
    assert two.have()[0].changed == []
    assert two.have()[1]["digest"] == has["digest"]
    one.model.stop()
    assert not processes.ours(one.model.state_dir)
    assert not processes.ours(two.model.state_dir)
    for folder in (one.model.state_dir, two.model.state_dir):
        assert not [path for path in Path(folder).rglob("*") if path.is_file() and token in path.read_text()]


def test_a_server_that_nobody_asks_ends_itself(pair: tuple[Host, Host]) -> None:
    one, _ = pair
    finish(lambda: model_host.serve(one.model, "127.0.0.1", "t", 0.5, sys.executable, ""))
    end = time.monotonic() + 30
    while processes.ours(one.model.state_dir) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes.ours(one.model.state_dir)


def test_a_server_of_a_deploy_that_was_killed_is_ended_by_the_next(pair: tuple[Host, Host]) -> None:
    one, _ = pair
    finish(lambda: model_host.serve(one.model, "127.0.0.1", "t", 600, sys.executable, ""))
    one.have(check=True)
    assert processes.ours(one.model.state_dir)
    one.have()
    assert not processes.ours(one.model.state_dir)


def test_a_copy_whose_giver_is_gone_says_so_and_goes_on_later(pair: tuple[Host, Host]) -> None:
    one, two = pair
    has = one.have()[1]
    gone = {"url": "http://127.0.0.1:9", "digest": has["digest"]}
    with pytest.raises(UserError, match=r"model a/m: fetch of .*refused"):
        finish(lambda: model_host.fetch(two.model, gone, "t", "n1", 1, sys.executable, False))
    assert not two.model.root.exists()


def test_a_checksum_that_is_not_the_wanted_one_is_refused(pair: tuple[Host, Host]) -> None:
    one, two = pair
    digest = one.have()[1]["digest"]
    assert one.have(kind="path", sha256=digest)[1]["digest"] == digest
    with pytest.raises(UserError, match=f"has the checksum {digest}, and model_sha256 is {'f' * 64}"):
        one.have(kind="path", sha256="f" * 64)
    with pytest.raises(UserError, match="is not there"):
        two.have(kind="path", sha256=digest)


def test_a_program_that_dies_is_told_with_its_last_words(pair: tuple[Host, Host]) -> None:
    one, _ = pair
    with pytest.raises(UserError, match=r"ended without a word. Its log:\n(.|\n)*sys.exit"):
        finish(lambda: one.model.advance("k", {"task": "hash"}, "/bin/cat") and (Outcome(), {}))


def test_a_half_model_in_the_way_of_a_download_is_left_alone(pair: tuple[Host, Host]) -> None:
    one, _ = pair
    (one.model.root / "config.json").unlink()
    before = contents(one.model.root)
    with pytest.raises(UserError, match=r"has no config.json; we overwrite no weights: move it away"):
        one.have(kind="hub")
    assert contents(one.model.root) == before
