"""The deployed plan and its lock."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from pdlib import deployed, folders
from pdlib.errors import UserError

US: dict[str, Any] = {"controller": "here", "place": "b 1", "sees_all": True, "pid": 100, "user": "ann", "verb": "deploy"}
AGAIN = {**US, "pid": 200, "verb": "bench"}
OTHERS = {**US, "controller": "there", "user": "bob"}


@pytest.fixture
def state(tmp_path: Path) -> str:
    return str(tmp_path / "state")


def test_the_plan_is_kept_and_read(state: str) -> None:
    assert deployed.read(state) is None
    Path(state).mkdir()
    assert deployed.store(state, {"ratio": "3p1d"}) is True
    assert deployed.store(state, {"ratio": "3p1d"}) is False
    assert deployed.read(state) == {"ratio": "3p1d"}
    assert (Path(state) / "plan.json").stat().st_mode & 0o777 == 0o600
    assert deployed.store(state, {"ratio": "2p2d"}) is True
    assert [p.name for p in Path(state).iterdir()] == ["plan.json"], "nothing is left of the atomic write"


def test_a_broken_plan_says_what_helps(state: str) -> None:
    Path(state).mkdir()
    (Path(state) / "plan.json").write_text('{"ratio": ')
    with pytest.raises(UserError, match=r"plan.json cannot be read .*teardown.yml removes it"):
        deployed.read(state)


def test_workers_of_a_host_that_was_torn_down_are_forgotten(state: str) -> None:
    assert deployed.forget(state, ["n1"], False) is False
    Path(state).mkdir()
    ranks = {"a": ["n1"], "b": ["n2"], "c": ["n2", "n1"]}
    workers = [{"name": name, "ranks": [{"host": host} for host in hosts]} for name, hosts in ranks.items()]
    deployed.store(state, {"ratio": "2p1d", "workers": workers})
    assert deployed.forget(state, ["n3"], False) is False
    assert deployed.forget(state, ["n1"], True) is True
    assert (deployed.read(state) or {})["workers"] == workers, "check mode"
    assert deployed.forget(state, ["n1"], False) is True
    assert deployed.read(state) == {"ratio": "2p1d", "workers": [workers[1]]}
    assert deployed.forget(state, ["n1"], False) is False


def test_the_lock_is_taken_given_back_and_taken_again(state: str) -> None:
    deployed.lock(state, US, [100], False)
    held = deployed.peek(state)
    assert held is not None
    assert {k: held[k] for k in US} == US
    deployed.lock(state, US, [100], False)
    deployed.unlock(state, US)
    assert deployed.peek(state) is None
    deployed.unlock(state, US)
    deployed.lock(state, OTHERS, [], False)


def test_a_live_command_of_the_same_controller_is_waited_for(state: str) -> None:
    deployed.lock(state, US, [100], False)
    with pytest.raises(UserError) as refused:
        deployed.lock(state, AGAIN, [100, 200], False)
    message = str(refused.value)
    for part in ("deploy of ann on here (pid 100), since 2", "UTC", "wait for it"):
        assert part in message
    assert "steal_lock" not in message, "there is nothing to steal from a command that runs"
    with pytest.raises(UserError, match=r"wait for it$"):
        deployed.lock(state, AGAIN, [100, 200], True)


def test_a_dead_command_of_the_same_controller_is_taken_over(state: str) -> None:
    deployed.lock(state, US, [100], False)
    deployed.lock(state, AGAIN, [200], False)
    held = deployed.peek(state)
    assert held is not None
    assert held["pid"] == 200


def test_a_lock_of_an_older_checkout_is_known_by_its_controller(state: str) -> None:
    deployed.lock(state, {name: value for name, value in US.items() if name not in ("place", "sees_all")}, [], False)
    with pytest.raises(UserError, match=r"wait for it$"):
        deployed.lock(state, AGAIN, [100], False)
    deployed.lock(state, AGAIN, [], False)


@pytest.mark.parametrize("unseen", [{"place": "b 2"}, {"place": "c 1"}, {"sees_all": False, "user": "bob"}])
def test_a_command_that_cannot_be_seen_is_not_dead(state: str, unseen: dict[str, Any]) -> None:
    """Another PID namespace, another machine of that name (or another boot), and a /proc that hides what others run."""
    deployed.lock(state, US, [100], False)
    with pytest.raises(UserError, match=r"deploy of ann on here \(pid 100\).*-e steal_lock=true"):
        deployed.lock(state, {**AGAIN, **unseen}, [200], False)
    deployed.unlock(state, {**US, "place": "b 2"})
    assert deployed.peek(state), "another machine's command of that number"
    deployed.lock(state, {**AGAIN, **unseen}, [200], True)


def test_one_s_own_dead_command_is_seen_where_others_are_hidden(state: str) -> None:
    deployed.lock(state, US, [100], False)
    deployed.lock(state, {**AGAIN, "sees_all": False}, [200], False)


@pytest.mark.parametrize("live", [[], [100], [200]])
def test_another_controllers_lock_is_only_stolen(state: str, live: list[int]) -> None:
    deployed.lock(state, OTHERS, [100], False)
    with pytest.raises(UserError, match=r"deploy of bob on there \(pid 100\).*-e steal_lock=true"):
        deployed.lock(state, AGAIN, live, False)
    deployed.lock(state, AGAIN, live, True)
    held = deployed.peek(state)
    assert held is not None
    assert (held["controller"], held["pid"]) == ("here", 200)


def test_the_lock_of_others_is_not_given_back(state: str) -> None:
    deployed.lock(state, OTHERS, [], False)
    deployed.unlock(state, US)
    assert deployed.peek(state) is not None


def test_a_broken_lock_counts_as_none(state: str) -> None:
    deployed.lock(state, OTHERS, [], False)
    (Path(state) / "lock.json").write_text("{")
    assert deployed.peek(state) is None
    deployed.lock(state, US, [], False)


def test_of_many_at_once_one_gets_it(state: str) -> None:
    won: list[int] = []
    lost: list[str] = []
    start = threading.Barrier(8)

    def take(pid: int) -> None:
        start.wait()
        try:
            deployed.lock(state, {**US, "pid": pid}, range(300, 308), False)
            won.append(pid)
        except UserError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=take, args=(300 + i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == 7
    assert json.loads((Path(state) / "lock.json").read_text())["pid"] == won[0]


def test_a_foreign_folder_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="holds files that are not ours"):
        deployed.lock(str(tmp_path), US, [], False)


def test_a_deployment_is_called_by_its_router_and_keeps_its_name(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "n1")
    assert folders.named(state) == folders.named(f"{state}/") == f"{state} on n1"
    folders.enroll(state, folders.named(state))
    assert not Path(state).exists(), "nothing is made for the name alone"
    folders.claim(state)
    folders.enroll(state, folders.named(state))
    deployed.store(state, {"ratio": "1p1d"})
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
    assert folders.named(state) == folders.deployment(state) == f"{state} on n1"
    (Path(state) / "plan.json").unlink()
    assert folders.named(state) == f"{state} on renamed", "a host of another one's is not its router"


def test_a_state_directory_of_another_deployment_is_refused_with_its_owner() -> None:
    owners = {"n1": "/s on r1", "n2": "", "n3": "/s on r2"}
    folders.refuse_others({"n1": "/s on r1", "n2": ""}, "/s on r1")
    folders.refuse_others(owners, "")
    with pytest.raises(
        UserError, match=r"^state_dir of n3 belongs .* has /s on r2, .* another state_dir; .* -l n3 -e steal_lock"
    ):
        folders.refuse_others(owners, "/s on r1")
    with pytest.raises(UserError, match=r"^this state_dir belongs .* -l HOST -e steal_lock=true"):
        folders.refuse_others({"": "/s on r2"}, "/s on r1")
