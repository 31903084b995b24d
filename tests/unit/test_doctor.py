"""doctor.yml's judgement: each fault is found by its own checks and no others, and no check is without a fault."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from unit.doctor_faults import SPOILT, Json, Spoil, healthy, made

from pdlib import doctor, doctor_exposure, doctor_fabric, doctor_host, doctor_serving
from pdlib.doctor_facts import SEVERITIES, Seen

REPO = Path(__file__).resolve().parents[2]


def bad(seen: Seen) -> list[doctor.Finding]:
    return [finding for finding in doctor.examine(seen) if finding.severity != "ok"]


@pytest.mark.parametrize("fabric", ["infiniband", "roce"])
def test_nothing_is_found_on_a_healthy_cluster(fabric: str) -> None:
    seen = made(healthy(fabric))
    assert bad(seen) == []
    good = {finding.id for finding in doctor.examine(seen)}
    quiet = {"busy", "silent-tcp", "kv-probe", "transport", "container-gpu"} | (
        {"gid", "mtu"} if fabric == "infiniband" else set()
    )
    assert good == set(doctor.CHECKS) - quiet
    assert doctor.verdict(doctor.examine(seen), 2) == f"doctor: all is well ({len(good)} checks of 2 hosts)"


@pytest.mark.parametrize(("ids", "severity", "where", "fabric", "spoil"), SPOILT, ids=[row[4].__name__[1:] for row in SPOILT])
def test_exactly_the_right_checks_find_it(ids: tuple[str, ...], severity: str, where: str, fabric: str, spoil: Spoil) -> None:
    facts = copy.deepcopy(healthy(fabric))
    spoil(facts)
    found = bad(made(facts))
    assert {finding.id for finding in found} == set(ids), found
    first = next(finding for finding in found if finding.id == ids[0])
    assert (first.severity, first.host) == (severity, where)
    for finding in found:
        assert finding.evidence
        # what is wrong has a variable or a command that puts it right
        assert finding.fix or finding.severity == "info", finding
    report = doctor.report(doctor.examine(made(facts)))
    assert report["ok"] == all(finding.severity != "error" for finding in found)
    assert json.loads(json.dumps(report)) == report


def test_every_check_is_provoked_by_a_fault() -> None:
    assert {check for ids, *_ in SPOILT for check in ids} == set(doctor.CHECKS)


#: Where a finding is made: module, line, severity.
Place = tuple[str, int, str]
MODULES = (doctor_host, doctor_fabric, doctor_exposure, doctor_serving)
WORDS = {"error": "error", "warning": "warning", "info": "info", "severe": "error"}


def words(called: ast.expr) -> list[str]:
    """The severities with which an expression, called, makes a finding."""
    if isinstance(called, ast.IfExp):
        return words(called.body) + words(called.orelse)
    return [WORDS[called.id]] if isinstance(called, ast.Name) and called.id in WORDS else []


def places() -> set[Place]:
    """Every place in the checks' source at which a finding is made."""
    trees = [(module.__name__, ast.parse(Path(str(module.__file__)).read_text())) for module in MODULES]
    calls = [(name, node) for name, tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {(name, node.lineno, severity) for name, node in calls for severity in words(node.func)}


def test_every_finding_is_provoked_by_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check makes several findings, which are not told apart by its id: each line that makes one is reached by a fault."""
    made_at: set[Place] = set()

    def noting(module: str, severity: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            made_at.add((module, sys._getframe(1).f_lineno, severity))
            return make(*arguments)

        return noted

    for module in MODULES:
        for severity in SEVERITIES[:-1]:
            if hasattr(module, severity):
                monkeypatch.setattr(module, severity, noting(module.__name__, severity, getattr(module, severity)))
    for *_, fabric, spoil in SPOILT:
        facts = copy.deepcopy(healthy(fabric))
        spoil(facts)
        doctor.examine(made(facts))
    assert len(places()) > len(doctor.CHECKS)
    assert made_at == places()


def test_every_check_says_what_holds_and_what_a_person_would_type() -> None:
    for check in doctor.CHECKS.values():
        assert re.fullmatch(r"[A-Z/][^\n]{20,}[^.]", check.holds), check.id
        assert check.instead, check.id
        assert re.fullmatch(r"[a-z][a-z-]*[a-z]", check.id)


def test_an_emulated_plan_and_none_at_all_are_judged_too() -> None:
    assert bad(Seen()) == []
    facts = healthy()
    # before a deployment, and where only some of the hosts could be examined
    facts.update(deployed=False, front={}, reach={})
    del facts["hosts"]["n2"], facts["clocks"]["n2"]
    facts["unreachable"]["n2"] = "cannot be reached: no route"
    assert [finding.id for finding in bad(made(facts))] == ["host"]


def test_the_table_is_most_severe_first_and_fits_a_terminal() -> None:
    facts = healthy()
    together = ("_old_driver", "_leftover", "_skew", "_port_down", "_dropped", "_dead_unit", "_called_sick", "_pair", "_edited")
    for *_, spoil in SPOILT:
        if spoil.__name__ in together:
            spoil(facts)
    findings = doctor.examine(made(facts))
    order = [SEVERITIES.index(finding.severity) for finding in findings]
    assert order == sorted(order)
    text = doctor.table(findings)
    assert max(map(len, text.splitlines())) <= 180
    first = text.splitlines()[2]
    assert first.startswith("ERROR")
    for finding in findings:
        if finding.severity != "ok":
            assert finding.id in text
    words = doctor.verdict(findings, 3)
    errors = sum(finding.severity == "error" for finding in findings)
    assert words.startswith(f"doctor: {errors} errors and ")
    assert "\n" not in words


def plugin(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, REPO / "plugins" / "action" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cuda_runtime_of_an_engine_is_that_of_its_lock_on_linux() -> None:
    examine = plugin("pd_examine")
    for engine in ("sglang-0.5.23", "sglang-0.5.17", "vllm-0.33.0"):
        assert examine.wheel_cuda([f"no-deps:requirements/engine-{engine}.txt"]) == "13.0.96", engine
    assert examine.wheel_cuda(["requirements/pdbench-emulate.txt", "pdbench"]) == ""
    assert [name for name in ("n1", "n1.cluster", "127.0.0.1", "::1") if examine.is_name(name)] == ["n1", "n1.cluster"]


@pytest.mark.parametrize(
    ("holder", "live", "busy"),
    [
        ({"verb": "bench", "user": "ann", "controller": "elsewhere", "pid": 7}, [], True),
        ({"verb": "bench", "user": "ann", "controller": "here", "pid": 7}, [7], True),
        # a command of this controller's that is dead
        ({"verb": "bench", "user": "ann", "controller": "here", "pid": 7}, [8], False),
        # it may live on another machine of that name
        ({"verb": "bench", "user": "ann", "controller": "here", "place": "another boot", "pid": 7}, [8], True),
        ({}, [], False),
    ],
)
def test_who_holds_the_lock_is_busy_unless_it_is_dead(holder: Json, live: list[int], busy: bool) -> None:
    examine = plugin("pd_examine")
    look = examine.ActionModule.__new__(examine.ActionModule)
    look.planned = {"pd_live_pids": live, "pd_owner": {"controller": "here", "place": "b", "sees_all": True, "user": "ann"}}
    seen = {"groups": {"router": ["n1"]}, "hostvars": {"n1": {"__pd_found": {"holder": holder}}}}
    assert look._holder(seen) == (holder if busy else {})


def test_the_probe_s_record_is_taken_from_the_deployment_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two inventories that share a results folder, and the names of their workers."""
    hosts_of = {"prefill-0": "n1", "decode-0": "n2"}
    ends = {
        name: {"host": host, "address": host, "workers": [name], "gpu": 0, "python": "/opt/pd"} for name, host in hosts_of.items()
    }
    pair = {"id": "0", "fingerprint": "f", "prefill": "prefill-0", "decode": "decode-0", "from": "prefill-0", "to": "decode-0"}
    work: Json = {
        "inventory": "mine-1",
        "backend": "mooncake",
        "op": "write",
        "mode": "report",
        "known": {},
        "waiting": {},
        "moving": {},
    }
    work |= {"ends": ends, "pairs": [{**pair, "expected": "rdma"}]}
    tells = {"trouble": "/opt/pd: No such file or directory"}
    path = plugin("pd_kv_path")
    judge = path.ActionModule.__new__(path.ActionModule)
    judge._task = SimpleNamespace(check_mode=False, args={"results_dir": str(tmp_path)})
    hosts = {"n1": {"__pd_probe_served": {}, "__pd_probe_moved": {}}, "n2": {"__pd_probe_served": tells, "__pd_probe_moved": {}}}
    judge._judge(work, {"hostvars": hosts})
    assert json.loads((tmp_path / "kv_probe.json").read_text())["inventory"] == "mine-1"

    examine = plugin("pd_examine")
    look = examine.ActionModule.__new__(examine.ActionModule)
    look.plan = {"transfer_backend": "mooncake", "pairs": [{"prefill": "prefill-0", "decode": "decode-0"}], "emulated": False}
    look.planned = {"pd_settings": {"results_dir": str(tmp_path)}, "pd_examined": {"inventory": "mine-1"}}
    facts = {**healthy(), "probe": look._probe()}
    assert [(row.id, row.severity) for row in bad(made(facts))] == [("kv-probe", "error")]
    look.planned["pd_examined"]["inventory"] = "theirs-2"
    assert look._probe() == {}


def test_the_page_of_checks_is_up_to_date_and_staleness_is_noticed(tmp_path: Path) -> None:
    tool = [sys.executable, str(REPO / "tools" / "docs_doctor.py"), "--check"]
    done = subprocess.run(tool, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stale = tmp_path / "doctor.md"
    stale.write_text((REPO / "docs" / "doctor.md").read_text().replace("nvidia-smi -L", "nvidia-smi", 1))
    done = subprocess.run([*tool, "--page", str(stale)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "run `make docs`" in done.stderr


def test_one_error_and_one_warning_are_counted_in_words() -> None:
    findings = [
        doctor.Finding("clock", "warning", "n1", "an hour ahead", "chrony"),
        doctor.Finding("gpu", "ok", "n1", "4 x H200", ""),
    ]
    assert doctor.verdict(findings, 1) == "doctor: 1 warning in 2 checks of 1 host; first: clock on n1: an hour ahead"
    assert doctor.report(findings)["ok"] is True
    assert doctor.table(findings).count("\n-> ") == 0
    assert "-> chrony" in doctor.table(findings)
