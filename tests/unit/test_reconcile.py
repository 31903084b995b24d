"""The steps of a host's units, with a service manager that only remembers; the real one is in tests/local."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pdlib import ask, keys, managers, processes, reconcile, role_switch, steps, units
from pdlib.errors import UserError
from pdlib.folders import claim
from pdlib.managers import Status, Supervisord
from pdlib.reconcile import Reconciler
from pdlib.steps import Outcome
from pdlib.teardown import remove_everything

UNITS: dict[str, tuple[str, int]] = {}
CALLS: list[str] = []


class Remembering(Supervisord):
    """supervisord's files, and units that do what they are told."""

    next_pid = 2**22 + 1

    def status(self) -> dict[str, Status]:
        return {name: Status(state, pid, "exit status 1" if state == "dead" else "") for name, (state, pid) in UNITS.items()}

    def reload(self) -> None:
        CALLS.append("reload")

    def start(self, names: Sequence[str]) -> None:
        for name in names:
            CALLS.append(f"start {name}")
            Remembering.next_pid += 1
            UNITS[name] = ("running", Remembering.next_pid)

    def stop(self, names: Sequence[str]) -> None:
        for name in names:
            CALLS.append(f"stop {name}")
            UNITS[name] = ("stopped", 0)

    def log_tail(self, name: str, lines: int = 25) -> str:
        return f"last words of {name}"

    def shutdown(self) -> None:
        CALLS.append("shutdown")
        UNITS.clear()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    UNITS.clear()
    CALLS.clear()
    monkeypatch.setitem(managers.MANAGERS, "supervisord", Remembering)
    monkeypatch.setattr(reconcile, "STEP_S", 1.0)
    folder = tmp_path / "state"
    claim(str(folder))
    return folder


def unit(name: str, *args: str, **more: Any) -> dict[str, Any]:
    argv = ["/opt/pd/bin/python", *args]
    made: dict[str, Any] = {"name": name, "title": name, "argv": argv, "env": {}, "listen": "127.0.0.1", "ports": []}
    return {**made, "health_url": None, "members": [], **more}


A, B = unit("pd-prefill-0", "a"), unit("pd-decode-0", "b")


def reconciler(
    home: Path,
    *wanted: dict[str, Any],
    check: bool = False,
    secrets: dict[str, str] | None = None,
    shipped: dict[str, str] | None = None,
) -> Reconciler:
    return Reconciler(
        str(home), str(home / "i"), "supervisord", "1p1d", wanted, check, secrets, "print()" if secrets else "", shipped=shipped
    )


def step(home: Path, *wanted: dict[str, Any], resumed: bool = False, **options: Any) -> Outcome:
    CALLS.clear()
    return reconciler(home, *wanted, **options).step(resumed)


def snapshot(home: Path) -> dict[str, str]:
    return {str(p.relative_to(home)): p.read_text() for p in home.rglob("*") if p.is_file()}


def test_a_first_step_writes_and_starts_and_a_second_changes_nothing(home: Path) -> None:
    first = step(home, A, B)
    assert first.done, first.message
    assert {"started pd-prefill-0", "started pd-decode-0", "wrote pd-prefill-0.sh"} <= set(first.changed)
    before, running = snapshot(home), dict(UNITS)
    second = step(home, A, B)
    assert (second.done, second.changed, second.diff, CALLS) == (True, [], [], [])
    assert (snapshot(home), UNITS) == (before, running)


def test_a_shipped_file_is_there_first_and_restarts_what_names_it(home: Path) -> None:
    named = unit("pd-prefill-0", "--init-expert-location", str(home / "files" / "experts.json"))
    first = step(home, named, B, shipped={"experts.json": "[1]"})
    assert "wrote files/experts.json" in first.changed
    assert (home / "files" / "experts.json").read_text() == "[1]"
    assert step(home, named, B, shipped={"experts.json": "[1]"}).changed == []
    outcome = step(home, named, B, shipped={"experts.json": "[2]"})
    assert outcome.changed == ["restarted pd-prefill-0", "wrote files/experts.json"]
    assert CALLS == ["stop pd-prefill-0", "start pd-prefill-0"]
    assert (home / "files" / "experts.json").read_text() == "[2]"


def test_only_the_unit_that_changed_is_restarted(home: Path) -> None:
    step(home, A, B)
    pid = UNITS["pd-decode-0"][1]
    outcome = step(home, unit("pd-prefill-0", "other"), B)
    assert outcome.done
    assert [c for c in outcome.changed if "wrote" not in c] == ["restarted pd-prefill-0"]
    assert CALLS == ["stop pd-prefill-0", "start pd-prefill-0"]
    assert UNITS["pd-decode-0"] == ("running", pid)
    script = home / "units" / "pd-prefill-0.sh"
    (diff,) = [row for row in outcome.diff if row["after_header"] == str(script)]
    assert "other" in diff["after"]
    assert "other" not in diff["before"]


def test_a_unit_that_is_to_be_kept_is_not_restarted(home: Path) -> None:
    step(home, A, B)
    with pytest.raises(UserError, match="pd-prefill-0 would restart while it serves"):
        Reconciler(
            str(home), str(home / "i"), "supervisord", "1p1d", [unit("pd-prefill-0", "other"), B], False, keep=["pd-prefill-0"]
        ).step(False)
    assert CALLS == ["reload", "start pd-prefill-0", "start pd-decode-0"]
    kept = Reconciler(
        str(home), str(home / "i"), "supervisord", "1p1d", [A, unit("pd-decode-0", "x")], False, keep=["pd-prefill-0"]
    )
    assert "restarted pd-decode-0" in kept.step(False).changed


def test_a_role_is_switched_without_a_restart_and_the_unit_is_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def switchable(role: str) -> dict[str, Any]:
        switch = {"flag": "--role", "role": role, "url": "http://127.0.0.1:1", "decode_peers": []}
        return unit("pd-worker-1", "--role", role, "--port", "1", switch=switch, health_url="http://127.0.0.1:1/ready")

    said: list[tuple[bool, str]] = []
    monkeypatch.setattr(reconcile, "healthy", lambda url: True)
    monkeypatch.setattr(role_switch, "bring", lambda name, switch, ask: said.pop(0) if said else (True, ""))
    step(home, switchable("prefill"))
    pid = UNITS["pd-worker-1"]
    said += [(False, "pd-worker-1 has requests left")] * 20
    waiting = step(home, switchable("decode"))
    assert (waiting.done, waiting.message) == (False, "pd-worker-1 has requests left")
    said[:] = [(True, "switched pd-worker-1 from prefill to decode")]
    outcome = step(home, switchable("decode"), resumed=True)
    assert outcome.done
    assert "switched pd-worker-1 from prefill to decode" in [*waiting.changed, *outcome.changed]
    assert UNITS["pd-worker-1"] == pid
    assert not [call for call in CALLS if call.startswith(("start", "stop"))]
    # a crash starts it in its new role
    assert "--role decode" in (home / "units" / "pd-worker-1.sh").read_text()
    # what is more than the role needs a restart
    more = switchable("decode")
    more["argv"] = [*more["argv"], "--new"]
    assert "restarted pd-worker-1" in step(home, more).changed


def test_members_change_the_script_and_restart_nothing(home: Path) -> None:
    def router(*members: str) -> dict[str, Any]:
        return unit("pd-router", "--port", "1", *members, members=list(members))

    step(home, router("--prefill", "u", "1"))
    outcome = step(home, router("--prefill", "u", "1", "--decode", "v"))
    assert outcome.changed == ["wrote pd-router.sh"]
    assert CALLS == []
    assert "--decode v" in (home / "units" / "pd-router.sh").read_text()
    assert step(home, router("--prefill", "u", "1", "--decode", "v")).changed == []


@pytest.mark.parametrize("check", [False, True])
def test_a_unit_whose_file_was_edited_may_run_what_stood_there_and_is_restarted(home: Path, check: bool) -> None:
    """Otherwise the file would be right again, and the process wrong, for every deploy to come."""
    step(home, A, B)
    script = home / "units" / "pd-prefill-0.sh"
    script.write_text(script.read_text() + "# --port 9\n")
    outcome = step(home, A, B, check=check)
    assert outcome.done
    if check:
        assert outcome.changed == ["would restart pd-prefill-0", "would write pd-prefill-0.sh"]
        assert CALLS == []
    else:
        assert outcome.changed == ["restarted pd-prefill-0", "wrote pd-prefill-0.sh"]
        assert CALLS == ["stop pd-prefill-0", "start pd-prefill-0"]
        assert "--port 9" not in script.read_text()
        assert step(home, A, B).changed == []


def test_a_unit_of_before_its_files_were_remembered_stays(home: Path) -> None:
    step(home, A)
    record = json.loads((home / "units.json").read_text())
    del record["pd-prefill-0"]["files"]
    (home / "units.json").write_text(json.dumps(record))
    assert step(home, A).changed == []
    assert "files" in json.loads((home / "units.json").read_text())["pd-prefill-0"]


def test_surplus_is_stopped_and_its_files_are_gone(home: Path) -> None:
    step(home, A, B)
    outcome = step(home, A)
    assert outcome.changed == ["stopped pd-decode-0"]
    assert CALLS[0] == "stop pd-decode-0"
    assert not [name for name in snapshot(home) if "decode" in name]
    assert list(json.loads((home / "units.json").read_text())) == ["pd-prefill-0"]


def test_surplus_that_only_the_record_knows_is_ended_too(home: Path) -> None:
    """The manager was killed, and its units live on."""
    step(home, A, B)
    UNITS.clear()
    outcome = step(home, A)
    assert "stopped pd-decode-0" in outcome.changed
    assert "started pd-prefill-0" in outcome.changed
    assert not [name for name in snapshot(home) if "decode" in name]


def test_surplus_that_waits_for_its_next_start_is_stopped_too(home: Path) -> None:
    step(home, A, B)
    UNITS["pd-decode-0"] = ("dead", 0)
    assert step(home, A).changed == ["stopped pd-decode-0"]
    assert CALLS[0] == "stop pd-decode-0"
    UNITS["pd-prefill-0"] = ("dead", 0)
    CALLS.clear()
    remove_everything(str(home), str(home / "none"), ["supervisord"], False, False)
    assert "stop pd-prefill-0" in CALLS


def test_a_host_without_units_has_nothing_to_do(home: Path) -> None:
    outcome = step(home)
    assert (outcome.done, outcome.changed, CALLS) == (True, [], [])
    assert list(snapshot(home)) == [".pd"]


def test_check_mode_tells_and_changes_nothing(home: Path) -> None:
    before = snapshot(home)
    outcome = step(home, A, check=True)
    assert outcome.done
    assert "would start pd-prefill-0" in outcome.changed
    assert outcome.diff
    assert (snapshot(home), CALLS) == (before, [])
    step(home, A, B)
    before = snapshot(home)
    outcome = step(home, unit("pd-prefill-0", "other"), check=True, secrets={keys.API: "k"})
    assert {"would restart pd-prefill-0", "would stop pd-decode-0"} <= set(outcome.changed)
    assert (snapshot(home), CALLS) == (before, [])
    assert step(home, A, B, check=True).changed == []


def test_a_key_is_in_one_private_file_and_a_new_one_restarts(home: Path) -> None:
    reads = unit("pd-prefill-0", f"{home}/{keys.LAUNCHER}", "--api-key", f"{home}/{keys.FILES[keys.API]}", "a")
    step(home, reads, secrets={keys.API: "first-k3y"})
    secret = home / keys.FILES[keys.API]
    assert secret.read_text() == "first-k3y"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert (home / keys.LAUNCHER).stat().st_mode & 0o777 == 0o700
    assert [name for name, text in snapshot(home).items() if "first-k3y" in text] == [keys.FILES[keys.API]]
    assert step(home, reads, secrets={keys.API: "first-k3y"}).changed == []
    changed = step(home, reads, secrets={keys.API: "second"}).changed
    assert "restarted pd-prefill-0" in changed
    assert secret.read_text() == "second"
    gone = step(home, A)
    assert f"removed {keys.FILES[keys.API]}" in gone.changed
    assert not secret.exists()


def test_the_hubs_token_lies_beside_the_keys_and_a_new_one_restarts_nothing(home: Path) -> None:
    reads = {**A, "env": keys.hub_env(str(home))}
    step(home, reads, secrets={keys.HUB: "hf_first"})
    token = home / keys.FILES[keys.HUB]
    assert (token.read_text(), token.stat().st_mode & 0o777) == ("hf_first", 0o600)
    assert [name for name, text in snapshot(home).items() if "hf_first" in text] == [keys.FILES[keys.HUB]]
    assert step(home, reads, secrets={keys.HUB: "hf_second"}).changed == [f"wrote {keys.FILES[keys.HUB]}"]
    step(home, A)
    assert not token.exists()


def test_a_key_lies_only_where_a_unit_reads_it_and_restarts_no_other(home: Path) -> None:
    both = [word for name in keys.FILES for word in ("--flag", f"{home}/{keys.FILES[name]}")]
    worker, router = unit("pd-prefill-0", *both), unit("pd-router", *both[:2])
    step(home, router, secrets={keys.API: "k", keys.ADMIN: "a"})
    assert not (home / keys.FILES[keys.ADMIN]).exists()
    step(home, worker, router, secrets={keys.API: "k", keys.ADMIN: "a"})
    assert (home / keys.FILES[keys.ADMIN]).stat().st_mode & 0o777 == 0o600
    changed = step(home, worker, router, secrets={keys.API: "k", keys.ADMIN: "b"}).changed
    assert sorted(changed) == ["restarted pd-prefill-0", f"wrote {keys.FILES[keys.ADMIN]}"]
    # a load generator's, on a host without workers, is left there as long as there is such a key
    step(home, router, secrets={keys.API: "k", keys.ADMIN: "b"})
    assert (home / keys.FILES[keys.ADMIN]).exists()
    assert f"removed {keys.FILES[keys.ADMIN]}" in step(home, router, secrets={keys.API: "k"}).changed


@pytest.mark.parametrize("secrets", [{}, {keys.API: "k"}, {keys.ADMIN: "a"}, {keys.API: "k", keys.ADMIN: "a"}])
def test_a_role_is_asked_with_the_key_and_changed_with_the_admin_key(
    home: Path, monkeypatch: pytest.MonkeyPatch, secrets: dict[str, str]
) -> None:
    sent: list[tuple[str, str | None]] = []

    def answer(method: str, url: str, key: str | None = None, body: object = None, timeout_s: float = 5.0) -> tuple[int, str]:
        sent.append((method, key))
        return 200, json.dumps({"loads": [{"disaggregation": {"mode": "prefill"}}]})

    monkeypatch.setattr(reconcile, "healthy", lambda url: True)
    monkeypatch.setattr(ask, "request", answer)
    switch = {"flag": "--role", "role": "decode", "url": "http://127.0.0.1:1", "decode_peers": []}
    step(home, unit("pd-worker-1", "--role", "decode", switch=switch, health_url="http://127.0.0.1:1/ready"), secrets=secrets)
    api = secrets.get(keys.API)
    assert sent == [("GET", api), ("POST", secrets.get(keys.ADMIN) or api)]


def test_an_engine_installed_anew_restarts_what_runs_from_it(home: Path) -> None:
    python = home.parent / "venv" / "bin" / "python"
    stamp = home.parent / "venv" / ".pd-stamp"
    python.parent.mkdir(parents=True)
    stamp.write_text("one")
    step(home, {**A, "argv": [str(python), "a"]}, B)
    stamp.write_text("two")
    assert step(home, {**A, "argv": [str(python), "a"]}, B).changed == ["restarted pd-prefill-0"]


def test_a_unit_that_dies_is_an_error_with_its_last_words(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(self: Remembering, names: Sequence[str]) -> None:
        UNITS.update({name: ("dead", 0) for name in names})

    monkeypatch.setattr(Remembering, "start", dying)
    with pytest.raises(UserError) as refused:
        step(home, A)
    assert "pd-prefill-0 died before it was ready (exit status 1)" in str(refused.value)
    assert str(refused.value).endswith("last words of pd-prefill-0")


def test_a_unit_started_anew_while_it_is_waited_for_has_died(home: Path) -> None:
    waiting = unit("pd-prefill-0", health_url="http://127.0.0.1:1/ready")
    outcome = step(home, waiting)
    assert not outcome.done
    assert outcome.message.startswith("pd-prefill-0 is starting (")
    assert "last words of pd-prefill-0" in outcome.message
    UNITS["pd-prefill-0"] = ("running", 2**22 + 999)
    with pytest.raises(UserError, match="pd-prefill-0 died before it was ready"):
        step(home, waiting, resumed=True)


def test_the_next_deploy_gives_a_unit_that_came_back_its_chance(home: Path) -> None:
    """It died once before it was ready and its manager started it anew: that was the last deploy's error, not this one's."""
    step(home, unit("pd-prefill-0", health_url="http://127.0.0.1:1/ready"))
    UNITS["pd-prefill-0"] = ("running", 2**22 + 999)
    outcome = step(home, unit("pd-prefill-0", health_url="http://127.0.0.1:1/ready"))
    assert not outcome.done
    assert "is starting" in outcome.message


def test_a_unit_that_was_ready_may_be_started_anew(home: Path) -> None:
    step(home, A)
    UNITS["pd-prefill-0"] = ("running", 2**22 + 999)
    assert step(home, A).changed == []


def test_what_became_of_units_since_a_deploy_started_them(home: Path) -> None:
    assert reconcile.became(str(home), "supervisord") == {}
    step(home, A, B, unit("pd-router", "r"))
    assert set((reconcile.became(str(home), "supervisord") or {}).values()) == {"same"}
    UNITS["pd-prefill-0"] = ("running", 2**22 + 999)
    UNITS["pd-decode-0"] = ("dead", 0)
    wanted = {"pd-prefill-0": "anew", "pd-decode-0": "ended", "pd-router": "same"}
    assert reconcile.became(str(home), "supervisord") == wanted


def test_a_manager_that_does_not_answer_says_of_no_unit_that_it_ended(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else healthy ranks of a worker over several hosts would be restarted with those of which nothing is known."""
    step(home, A)

    def silent(*arguments: object) -> None:
        raise UserError("systemctl show: timed out")

    monkeypatch.setitem(managers.MANAGERS, "supervisord", silent)
    assert reconcile.became(str(home), "supervisord") is None


def test_a_unit_that_stopped_by_itself_is_started(home: Path) -> None:
    step(home, A, B)
    UNITS["pd-prefill-0"] = ("dead", 0)
    outcome = step(home, A, B)
    assert outcome.changed == ["started pd-prefill-0"]


def test_a_taken_port_is_named_with_its_holder_and_nothing_starts(home: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(UserError) as refused:
            step(home, unit("pd-prefill-0", ports=[port]), B)
    message = str(refused.value)
    assert f"port {port} of 127.0.0.1, which pd-prefill-0 needs, is held by process {os.getpid()} (" in message
    assert "worker_port_base" in message
    assert not [call for call in CALLS if call.startswith("start")]


def test_health_is_a_200_and_nothing_else() -> None:
    def answer(text: bytes) -> bool:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen()

            def serve() -> None:
                peer, _ = sock.accept()
                with peer:
                    peer.recv(1000)
                    peer.sendall(text)

            thread = threading.Thread(target=serve)
            thread.start()
            healthy = reconcile.healthy(f"http://127.0.0.1:{sock.getsockname()[1]}/ready")
            thread.join()
            return healthy

    assert answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert not answer(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")
    assert not answer(b"SSH-2.0-OpenSSH\r\n")
    assert not answer(b"")
    assert not reconcile.healthy("http://127.0.0.1:1/ready")


# ---------------------------------------------------------------- folders


def test_a_folder_is_claimed_once_and_privately(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert claim(str(folder)) is True
    assert claim(str(folder)) is False
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "empty").mkdir()
    assert claim(str(tmp_path / "empty")) is True


def test_what_is_not_ours_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="holds files that are not ours: set another state_dir or install_dir"):
        claim(str(tmp_path))
    with pytest.raises(UserError, match=r"cannot make .*: .*set state_dir and install_dir"):
        claim(str(tmp_path / "precious"))
    with pytest.raises(UserError, match=r"cannot make .*: .*set state_dir and install_dir"):
        claim(str(tmp_path / "precious" / "deeper"))


def test_hosts_that_share_a_folder_may_claim_it_at_once(tmp_path: Path) -> None:
    folder, errors = tmp_path / "shared", list[str]()
    exists = Path.exists

    def slow_exists(path: Path, **options: Any) -> bool:
        """Between the look for our mark and the look for other files, the other host makes both."""
        found = exists(path, **options)
        if path == folder / ".pd" and not found:
            folder.mkdir(exist_ok=True)
            (folder / ".pd").write_text("made meanwhile")
            (folder / ".lock").write_text("")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "exists", slow_exists)
        claim(str(folder))
    start = threading.Barrier(6)

    def take(number: int) -> None:
        start.wait()
        try:
            claim(str(tmp_path / f"round-{number // 6}"))
        except UserError as error:
            errors.append(str(error))

    for first in range(0, 60, 6):
        threads = [threading.Thread(target=take, args=(first + i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_teardown_removes_what_is_ours_and_works_twice(home: Path) -> None:
    step(home, A, B)
    install = home.parent / "install"
    claim(str(install))
    check = remove_everything(str(home), str(install), ["supervisord"], False, True)
    assert "stopped pd-prefill-0" in check.changed
    assert home.exists()
    assert UNITS
    done = remove_everything(str(home), str(install), ["supervisord"], False, False)
    assert done.done
    assert {"stopped pd-decode-0", "stopped pd-prefill-0", f"removed {home}"} <= set(done.changed)
    assert not home.exists()
    assert install.exists(), "installs stay without purge"
    again = remove_everything(str(home), str(install), ["supervisord"], False, False)
    assert (again.done, again.changed) == (True, [])
    purged = remove_everything(str(home), str(install), ["supervisord"], True, False)
    assert purged.changed == [f"removed {install}"]
    assert [p.name for p in home.parent.iterdir()] == []


def test_runs_that_were_never_fetched_outlive_a_teardown_but_not_a_purge(home: Path) -> None:
    step(home, A)
    (home / "runs" / "r1").mkdir(parents=True)
    (home / "runs" / "r1" / "requests.parquet").write_text("x")
    outcome = remove_everything(str(home), str(home / "none"), ["supervisord"], False, False)
    assert [line for line in outcome.changed if line.startswith("kept")] == [f"kept {home}/runs/r1: never fetched"]
    assert set(snapshot(home)) == {".pd", "runs/r1/requests.parquet"}
    remove_everything(str(home), str(home / "none"), ["supervisord"], True, False)
    assert not home.exists()


@pytest.mark.parametrize("wanted", [[A], []])
def test_units_of_another_deployment_are_no_surplus(home: Path, wanted: list[dict[str, Any]]) -> None:
    """A host without units of ours (a bench client, say) would have had all of its units stopped."""

    def deploy(name: str, *units: dict[str, Any]) -> Outcome:
        return Reconciler(str(home), str(home / "i"), "supervisord", "1p1d", units, False, deployment=name).step(False)

    deploy("/s on r1", A, B)
    before, calls = snapshot(home), list(CALLS)
    with pytest.raises(UserError, match="belongs to the deployment whose router has /s on r1"):
        deploy("/s on r2", *wanted)
    assert (snapshot(home), CALLS) == (before, calls)
    deploy("/s on r1", A)
    assert (home / "deployment").read_text() == "/s on r1\n"


def test_a_purge_keeps_an_install_directory_while_others_use_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install, other = home.parent / "install", home.parent / "other"
    claim(str(install))
    (install / "caches").mkdir()
    claim(str(other))

    def deploy(folder: Path) -> None:
        Reconciler(str(folder), str(install), "supervisord", "1p1d", [], False).step(False)

    def purge(folder: Path) -> list[str]:
        return remove_everything(str(folder), str(install), ["supervisord"], True, False).changed

    for folder in (home, other):
        deploy(folder)
    here = socket.gethostname()
    kept = f"kept {install}: used by {other} on {here} (as {install}/users says)"
    check = remove_everything(str(home), str(install), ["supervisord"], True, True)
    assert kept in check.changed
    assert purge(home) == [kept, f"removed {home}"]
    assert (install / "caches").is_dir(), "what is noted there is theirs, too"
    # a host that shares it over the network
    monkeypatch.setattr(socket, "gethostname", lambda: "n2")
    deploy(other)
    assert f"used by {other} on {here}" in purge(other)[0]
    monkeypatch.setattr(socket, "gethostname", lambda: here)
    assert purge(home) == [f"removed {install}"], "a state directory that is gone uses nothing"


def test_systemd_units_of_others_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(managers.Systemd, "UNITS", tmp_path)
    for name, folder in (("pd-ours", "/s/pd"), ("pd-other", "/s/pd-2"), ("pd-inside", "/s/pd/two"), ("pd-agent", "")):
        text = units.systemd_unit(unit(name), folder, "1p1d") if folder else "[Service]\nExecStart=/usr/bin/agent\n"
        (tmp_path / f"{name}.service").write_text(text)
    (tmp_path / "pd-gone.service").symlink_to(tmp_path / "nothing")
    assert [path.stem for path in managers.Systemd("/s/pd", "/i", "").own_units()] == ["pd-ours"]


def test_teardown_spares_a_folder_without_our_mark(home: Path) -> None:
    (home / ".pd").unlink()
    (home / "precious").write_text("x")
    with pytest.raises(UserError, match=r"has no file .pd, so it is not one that deploy_pd.yml made"):
        remove_everything(str(home), str(home / "none"), ["supervisord"], False, False)
    assert (home / "precious").exists()


def test_files_are_written_whole_with_their_mode(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    assert managers.write(path, "a", 0o600) is True
    assert managers.write(path, "a", 0o600) is False
    assert managers.write(path, "a", 0o700) is True
    assert managers.write(path, "b", 0o700) is True
    assert path.read_text() == "b"
    assert path.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert managers.tail(log, 3) == ""
    log.write_bytes(b"\xff\n" + b"x" * 200_000 + b"\n" + b"\n".join(b"line %d" % i for i in range(10)))
    assert managers.tail(log, 3) == "line 7\nline 8\nline 9"
    assert processes.ours(str(tmp_path)) == []


def test_what_a_step_kept_is_no_change() -> None:
    assert not steps.changed(["kept /opt/pd: used by /b on n1"])
    assert steps.changed(["kept /opt/pd: used by /b on n1", "removed /a"])
    assert not steps.changed([])
