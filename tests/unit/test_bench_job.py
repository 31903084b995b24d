"""A run on the client host: who it runs as, and what of it leaves the host."""

from __future__ import annotations

import base64
import json
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdlib import accounts, processes
from pdlib.bench_job import Job
from pdlib.errors import UserError

RUN = "20260101-120000-1p1d"
#: Stands for systemd-run: notes what it is asked, and runs the command in the folder that it is given.
TOOL = """#!/bin/sh
echo "$@" > {folder}/asked
for word in "$@"; do case $word in --working-directory=*) cd "${{word#*=}}";; esac; done
while [ "$1" != -- ]; do shift; done
shift
{run}
"""


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    before = os.umask(0o022)
    folder = tmp_path / "state"
    yield folder
    processes.kill([p.pid for p in processes.ours(str(folder))], 2)
    os.umask(before)


def finish(job: Job) -> None:
    end = time.monotonic() + 60
    while not job.watch().done:
        assert time.monotonic() < end


def test_a_run_of_our_own_lives_in_a_session_of_its_own(state: Path) -> None:
    job = Job(str(state), RUN)
    script = "echo said; ps -o sid= -p $$ > {dir}/sid; echo '{}' > {dir}/summary.json"
    job.start(["/bin/sh", "-c", script], {"ratio": "1p1d"}, {}, {}, 1)
    finish(job)
    assert int((job.folder / "sid").read_text()) != os.getsid(0)
    assert (job.folder / "run.log").read_text() == "said\n"
    assert json.loads((job.folder / "plan.json").read_text()) == {"ratio": "1p1d"}


def test_files_of_the_load_lie_in_the_run_and_those_of_the_controller_stay_behind(state: Path, tmp_path: Path) -> None:
    job = Job(str(state), RUN)
    files = {name: base64.b64encode(name.encode()).decode() for name in ("load.yml", "dataset.jsonl", "tokenizer.json")}
    job.start(["/bin/sh", "-c", "cat {dir}/load.yml {dir}/dataset.jsonl"], {}, files, {}, 1)
    finish(job)
    assert (job.folder / "run.log").read_text() == "load.ymldataset.jsonl"
    job.pack(str(tmp_path / "run.tar.gz"))
    with tarfile.open(tmp_path / "run.tar.gz") as tar:
        packed = {Path(name).name for name in tar.getnames()}
    assert "load.yml" in packed
    assert not {"dataset.jsonl", "tokenizer.json"} & packed


def test_what_calibrates_the_client_goes_first_and_ends_nothing(state: Path) -> None:
    job = Job(str(state), RUN)
    check = ["/bin/sh", "-c", 'echo "it\'s slow" > {dir}/selfcheck.json; echo checked; exit 3']
    job.start(["/bin/sh", "-c", "cat {dir}/selfcheck.json"], {}, {}, {}, 1, check)
    finish(job)
    assert job.exit_code() == 0
    assert (job.folder / "run.log").read_text() == "checked\nit's slow\n"


def test_a_run_of_another_user_is_a_service_of_systemds(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "systemd-run"
    tool.parent.mkdir()
    tool.write_text(TOOL.format(folder=tmp_path, run='"$@" &'))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(accounts, "ensure", lambda name: False)
    owned: dict[str, str] = {}
    monkeypatch.setattr(accounts, "own", lambda path, name: owned.update({path.name: name}))
    job = Job(str(state), RUN, "pd")
    job.start(["/bin/sh", "-c", "sleep 0.3"], {}, {}, {"api_key": "s3same", "admin_api_key": "op3n"}, 1)
    assert job.running() or job.exit_code() is not None, "it is there when start returns, or watch would call it killed"
    finish(job)
    asked = (tmp_path / "asked").read_text()
    assert f"--unit=pd-bench-{RUN} --uid=pd" in asked
    assert f"--working-directory={state}/run/bench-{RUN}" in asked
    assert "s3same" not in asked
    assert "op3n" not in asked
    files = [state / "secrets" / name for name in ("api_key", "admin_api_key")]
    assert [(file.read_text(), file.stat().st_mode & 0o777) for file in files] == [("s3same", 0o600), ("op3n", 0o600)]
    assert owned == dict.fromkeys(("api_key", "admin_api_key", f"bench-{RUN}", RUN, "plan.json"), "pd")
    assert state.stat().st_mode & 0o777 == 0o711


def test_a_service_that_does_not_start_says_why(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "systemd-run"
    tool.parent.mkdir()
    tool.write_text(TOOL.format(folder=tmp_path, run="echo 'Failed to start transient service unit' >&2; exit 1"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(accounts, "ensure", lambda name: False)
    monkeypatch.setattr(accounts, "own", lambda path, name: None)
    with pytest.raises(UserError, match="the load generator does not start: Failed to start transient service unit"):
        Job(str(state), RUN, "pd").start(["/bin/true"], {}, {}, {}, 1)


def test_the_archive_names_no_owner_and_nothing_stays_when_the_run_is_dropped(state: Path, tmp_path: Path) -> None:
    job = Job(str(state), RUN)
    job.start(["/bin/true"], {}, {}, {}, 1)
    finish(job)
    archive = tmp_path / "run.tar.gz"
    job.pack(str(archive))
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, "", "")}
    assert f"{RUN}/plan.json" in {member.name for member in members}
    with pytest.raises(UserError, match="the run cannot be packed: No such file or directory"):
        job.pack(str(tmp_path / "no such folder" / "run.tar.gz"))
    job.drop()
    assert not [path for path in state.rglob("*") if RUN in path.name]


def test_what_goes_after_the_load_changes_nothing_of_how_it_ended(state: Path) -> None:
    job = Job(str(state), RUN)
    after = ["/bin/sh", "-c", "mkdir {dir}/tools; echo at it > {dir}/tools/progress; cat {dir}/exit_code; exit 7"]
    job.start(["/bin/sh", "-c", "echo loaded; exit 3"], {}, {}, {}, 1, after=after)
    finish(job)
    assert job.exit_code() == 3
    assert (job.folder / "run.log").read_text() == "loaded\n"
    assert (job.folder / "after.log").read_text() == "3\n"
    assert not job.running(), "watch waits for it"


def test_nothing_goes_after_a_load_that_could_not_measure(state: Path) -> None:
    job = Job(str(state), RUN)
    job.start(["/bin/sh", "-c", "exit 1"], {}, {}, {}, 1, after=["/bin/touch", "{dir}/went"])
    with pytest.raises(UserError, match="ended with exit code 1"):
        finish(job)
    assert not (job.folder / "went").exists()
