"""What people read at the end of a command."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pdlib import tables

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ([], ""),
        (["started pd-a", "stopped pd-c", "started pd-b"], "started pd-a, pd-b; stopped pd-c"),
        (["would start pd-a", "would start pd-b", "would stop pd-c"], "would start pd-a, pd-b; would stop pd-c"),
        (["made user pd", "made install_dir and state_dir"], "made user pd; made install_dir and state_dir"),
        (["wrote a", "wrote b"], "wrote a, b"),
        (["wrote a", "started x", "wrote b", "wrote c"], "wrote 3 files; started x"),
        (["would write a", "would write b", "would write c"], "would write 3 files"),
        (["removed /var/lib/pd", "removed user pd"], "removed /var/lib/pd; removed user pd"),
        (["got wheels of engine", "got wheels of router"], "got wheels of engine, of router"),
    ],
)
def test_changes_of_one_kind_stand_together(changes: list[str], line: str) -> None:
    assert tables.grouped(changes) == line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (10.2, "10 s"), (119.4, "119 s"), (120, "2 min 0 s"), (7500, "2 h 5 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


# ---------------------------------------------------------------- the summary of a command


class Shown:
    def __init__(self) -> None:
        self.text = ""

    def display(self, text: str, *_: Any, **__: Any) -> None:
        self.text += text + "\n"


class Thing:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@pytest.fixture
def summary() -> Any:
    spec = importlib.util.spec_from_file_location("pd_summary", REPO / "plugins" / "callback" / "pd_summary.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.CallbackModule()
    made._display = Shown()
    made.v2_playbook_on_start(Thing(_file_name="/some/where/deploy_pd.yml"))
    return made


def result(host: str, message: str, run_once: bool = False) -> Any:
    task = Thing(get_name=lambda: "worker : Units", run_once=run_once, delegate_to=None)
    return Thing(_host=Thing(get_name=lambda: host), _task=task, _result={"msg": message})


def test_a_command_that_worked_says_how_long_it_took(summary: Any) -> None:
    summary.v2_playbook_on_stats(Thing(processed={"n1": 1}, failures={}, dark={}, changed={}))
    assert summary._display.text.startswith("ansible-playbook deploy_pd.yml took 0.")
    assert summary._display.text.count("\n") == 1


def test_a_command_that_did_not_names_hosts_reasons_and_what_to_do(summary: Any) -> None:
    summary.v2_runner_on_failed(result("n2", "Task failed: pd-decode-0 died before it was ready.\nTraceback ..."))
    summary.v2_runner_on_failed(result("n1", "nothing to see"), ignore_errors=True)
    summary.v2_runner_on_unreachable(result("n3", "ssh: connect to host n3 port 22: No route to host"))
    ended = {"failures": {"n2": 1}, "dark": {"n3": 1}, "changed": {"n2": 1}}
    summary.v2_playbook_on_stats(Thing(processed=dict.fromkeys(["n1", "n2", "n3"], 1), **ended))
    lines = [" ".join(line.split()) for line in summary._display.text.splitlines()]
    assert "n2 FAILED at worker : Units: pd-decode-0 died before it was ready." in lines
    assert "n3 UNREACHABLE: ssh: connect to host n3 port 22: No route to host" in lines
    assert "n1 not at fault; went no further" in lines
    assert [line.split()[0] for line in lines if line[:2] in ("n1", "n2", "n3")][-1] == "n1", "the ones at fault come first"
    assert "unreachable: try ssh n3 by hand (docs/hosts.md); what runs on other hosts was left as it is" in lines
    assert any(line.startswith("next: put it right and type ansible-playbook deploy_pd.yml again") for line in lines)
    assert "Traceback" not in summary._display.text


def test_what_runs_once_for_all_blames_no_host_and_a_dark_one_is_still_named(summary: Any) -> None:
    summary.v2_runner_on_unreachable(result("n2", "ssh: connect to host n2 port 22: No route to host"))
    summary.v2_runner_on_failed(result("n1", "the run is INVALID: every_worker_served", run_once=True))
    summary.v2_playbook_on_stats(Thing(processed=dict.fromkeys(["n1", "n2", "n3"], 1), failures={"n1": 1}, dark={}, changed={}))
    lines = [" ".join(line.split()) for line in summary._display.text.splitlines()]
    assert "all hosts FAILED at worker : Units: the run is INVALID: every_worker_served" in lines
    assert "n2 UNREACHABLE: ssh: connect to host n2 port 22: No route to host" in lines
    assert {"n1 not at fault; went no further", "n3 not at fault; went no further"} <= set(lines)


def test_a_dark_host_is_the_one_that_was_asked_and_what_others_did_is_not_denied(summary: Any) -> None:
    gone = result("n1", "ssh: connect to host n2 port 22: No route to host")
    gone._task.delegate_to = "n2"
    summary.v2_runner_on_unreachable(gone)
    summary.v2_runner_on_failed(result("n3", "no room"))
    summary.v2_playbook_on_stats(Thing(processed={"n1": 1, "n3": 1}, failures={"n3": 1}, dark={}, changed={"n1": 2}))
    lines = [" ".join(line.split()) for line in summary._display.text.splitlines()]
    assert "n2 UNREACHABLE: ssh: connect to host n2 port 22: No route to host" in lines
    assert "n1 not at fault; the reports above say what was done" in lines
    assert "n3 FAILED at worker : Units: no room" in lines
    assert "unreachable: try ssh n2 by hand (docs/hosts.md)" in lines


def test_a_failure_that_was_rescued_is_none(summary: Any) -> None:
    summary.v2_runner_on_failed(result("n1", "could not be fetched"))
    summary.v2_playbook_on_stats(Thing(processed={"n1": 1}, failures={}, dark={}, changed={}))
    assert "could not" not in summary._display.text
