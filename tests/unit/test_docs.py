"""What the documentation says is what the code takes: modules, actions, roles and variables."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ansible.module_utils
import pytest
import yaml
from ansible.module_utils import basic
from jinja2 import Environment, nodes

from pdlib.variables import SCOPES, VARIABLES

REPO = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MODULES = sorted(path.stem for path in (REPO / "library").glob("*.py"))
ACTIONS = sorted(path.stem for path in (REPO / "plugins" / "action").glob("*.py"))
#: one without tasks (pd) only names variables
ROLES = sorted(path.parent.name for path in (REPO / "roles").glob("*/tasks"))
#: what Ansible itself sets, as far as roles use it
MAGIC = {
    "hostvars", "inventory_hostname", "groups", "omit", "ansible_check_mode", "ansible_play_hosts", "ansible_skip_tags",
    "ansible_failed_result",
}  # fmt: skip


def run(*command: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=120)


@pytest.fixture(scope="module")
def rendered() -> Any:
    """What ansible-doc makes of every module, in one process."""
    done = run(str(BIN / "ansible-doc"), "-M", "library", "--json", *MODULES)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Made(Exception):
    """The arguments that a module gave to AnsibleModule."""


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as Ansible imports it: with our module_utils among Ansible's."""
    ours = str(REPO / "library" / "module_utils")
    monkeypatch.setattr(ansible.module_utils, "__path__", [*ansible.module_utils.__path__, ours])
    spec = importlib.util.spec_from_file_location(f"library_{name}", REPO / "library" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def declared(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the AnsibleModule that the module makes."""

    def made(**given: Any) -> None:
        raise Made(given)

    module = load(name, monkeypatch)
    monkeypatch.setattr(module, "AnsibleModule", made)
    with pytest.raises(Made) as caught:
        module.main()
    given: dict[str, Any] = caught.value.args[0]
    return given


def shape(option: dict[str, Any]) -> dict[str, Any]:
    """What documentation and code must agree on."""
    given = {name: option[name] for name in ("type", "elements", "choices", "default") if option.get(name) is not None}
    return {**given, "required": bool(option.get("required"))}


@pytest.mark.parametrize("name", MODULES)
def test_options_of_a_module_are_documented_as_they_are(name: str, rendered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    documented = rendered[name]["doc"]["options"]
    given = declared(name, monkeypatch)
    assert {option: shape(said) for option, said in documented.items()} == {
        option: shape(taken) for option, taken in given["argument_spec"].items()
    }
    support = rendered[name]["doc"]["attributes"]["check_mode"]["support"]
    assert bool(given.get("supports_check_mode")) == (support == "full")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_examples_that_name_it_and_says_what_it_returns(name: str, rendered: Any) -> None:
    tasks = yaml.safe_load(rendered[name]["examples"])
    used = {key for task in tasks for key in task} | {task.get("pd_poll", {}).get("module") for task in tasks}
    assert name in used
    for task in tasks:
        for module in MODULES:
            assert set(task.get(module) or {}) <= set(rendered[module]["doc"]["options"])
        called = task.get("pd_poll") or {}
        if called:
            assert set(called.get("args", {})) <= set(rendered[called["module"]]["doc"]["options"])
    for key, returned in (rendered[name].get("return") or {}).items():
        assert {"description", "returned", "type", "sample"} <= set(returned), key


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_takes_what_its_documentation_says(name: str, rendered: Any) -> None:
    source = (REPO / "plugins" / "action" / f"{name}.py").read_text()
    found = re.search(r"_VALID_ARGS(?:: frozenset\[str\])? = frozenset\((?:\{([^}]*)\})?\)", source)
    assert found
    assert set(re.findall(r'"(\w+)"', found[1] or "")) == set(rendered[name]["doc"]["options"])
    assert rendered[name]["doc"]["has_action"]


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_run_as_a_module_says_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    module = load(name, monkeypatch)
    monkeypatch.setattr(basic.AnsibleModule, "__init__", lambda self, **given: None)
    monkeypatch.setattr(basic.AnsibleModule, "fail_json", lambda self, msg: said.append(msg))
    module.main()
    assert said == [f"{name} runs on the controller: use the checkout's ansible.cfg, which names plugins/action"]


def templates(value: Any, key: str = "") -> list[str]:
    """Every piece of Jinja in a task: what stands in braces, and conditions, which are bare."""
    if isinstance(value, dict):
        return [text for name, item in value.items() for text in templates(item, str(name))]
    if isinstance(value, list):
        return [text for item in value for text in templates(item, key)]
    if not isinstance(value, str):
        return []
    return ["{{ " + value + " }}"] if key in ("when", "until", "failed_when", "changed_when") else [value]


def read_by(role: str, file: str) -> set[str]:
    """The variables that a role's task file takes from outside; files that it includes count as part of it.

    Left out: what Ansible sets, what tasks register, loop variables, and what is handed to an included file.
    """
    names: set[str] = set()
    for task in yaml.safe_load((REPO / "roles" / role / "tasks" / f"{file}.yml").read_text()):
        for text in templates({k: v for k, v in task.items() if k not in ("name", "loop_control")}):
            names |= {found.name for found in Environment().parse(text).find_all(nodes.Name)}
        for keyword in ("ansible.builtin.include_tasks", "ansible.builtin.import_tasks"):
            if keyword in task:
                names |= read_by(role, task[keyword].removesuffix(".yml"))
        names -= set(task.get("vars", {})) | {task.get("loop_control", {}).get("loop_var", "item")}
    return {name for name in names - MAGIC if not name.startswith("__pd_")}


def entered() -> set[tuple[str, str]]:
    """Every (role, entry point) that a playbook or a role uses."""
    used: set[tuple[str, str]] = set()
    for path in [*(REPO / "playbooks").glob("*.yml"), *(REPO / "roles").glob("*/tasks/*.yml")]:
        for block in yaml.safe_load(path.read_text()):
            tasks = [inner for task in block.get("tasks", [block]) for inner in task.get("block", [task])]
            for task in tasks:
                for keyword in ("ansible.builtin.import_role", "ansible.builtin.include_role"):
                    if keyword in task:
                        used.add((task[keyword]["name"], task[keyword].get("tasks_from", "main")))
    return used


def specified(role: str) -> dict[str, Any]:
    specs: dict[str, Any] = yaml.safe_load((REPO / "roles" / role / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    return specs


def test_every_entry_point_that_is_used_has_an_argument_spec_and_no_other() -> None:
    assert {(role, entry) for role in ROLES for entry in specified(role)} == entered()


@pytest.mark.parametrize(("role", "entry"), sorted(entered()))
def test_an_argument_spec_lists_what_the_tasks_read(role: str, entry: str) -> None:
    options = specified(role)[entry]["options"]
    assert set(options) == read_by(role, entry)
    for name, option in options.items():
        assert option["description"], name
        assert option.get("required") or option.get("no_log"), f"{name} is neither needed nor a secret that may be missing"


def test_what_the_plan_returns_is_documented_and_reaches_roles_under_the_same_names(rendered: Any) -> None:
    derived = yaml.safe_load((REPO / "roles" / "pd" / "vars" / "main.yml").read_text())
    assert derived == {name: f"{{{{ __pd_planned.{name} }}}}" for name in derived}
    made = set(re.findall(r'"(pd_\w+)"', (REPO / "plugins" / "action" / "pd_plan.py").read_text()))
    assert set(derived) == set(rendered["pd_plan"]["return"]) == made
    taken = {name for role in ROLES for spec in specified(role).values() for name in spec["options"]}
    assert taken - {"hf_token", "preflight_verb"} <= set(derived)


def test_the_reader_of_task_files_sees_names_wherever_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "roles" / "x" / "tasks"
    folder.mkdir(parents=True)
    (folder / "main.yml").write_text(
        "- a: {b: ['{{ pd_list | map(attribute=\"k\") | flatten }}']}\n  when: pd_when | length > 0\n  register: __pd_r\n"
        "- ansible.builtin.include_tasks: more.yml\n  loop: '{{ __pd_r.runs }}'\n  loop_control: {loop_var: x_one}\n"
    )
    (folder / "more.yml").write_text("- a: '{{ x_one }} {{ x_given[inventory_hostname] }}'\n  delegate_to: '{{ pd_to.host }}'\n")
    monkeypatch.setattr(sys.modules[__name__], "REPO", tmp_path)
    assert read_by("x", "main") == {"pd_list", "pd_when", "x_given", "pd_to"}


def test_the_page_of_variables_is_up_to_date_and_staleness_is_noticed(tmp_path: Path) -> None:
    tool = [sys.executable, "tools/docs_variables.py", "--check"]
    fresh = run(*tool)
    assert fresh.returncode == 0, fresh.stderr
    stale = tmp_path / "variables.md"
    stale.write_text((REPO / "docs" / "variables.md").read_text().replace("ratio", "ratoi", 1))
    done = run(*tool, "--page", str(stale))
    assert done.returncode == 1
    assert "run `make docs`" in done.stderr


def test_the_page_has_every_variable_once_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", (REPO / "docs" / "variables.md").read_text(), re.M)
    assert [name for name, _, _ in rows] == [v.name for scope in SCOPES for v in VARIABLES.values() if v.scope == scope]
    assert {name: default for name, _, default in rows}["worker_port_base"] == "`30000`"


@pytest.mark.parametrize(
    ("heading", "folder"), [("pdlib", "library/module_utils/pdlib"), ("pdbench", "bench/pdbench")], ids=["pdlib", "pdbench"]
)
def test_the_map_of_modules_names_each_once(heading: str, folder: str) -> None:
    page = (REPO / "docs" / "architecture.md").read_text()
    table = page.split(f"### {heading}, by job\n")[1].split("\n\n")[0]
    there = {path.stem for path in (REPO / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    known = [name for name in re.findall(r"`(\w+)`", table) if name in there]
    assert sorted(known) == sorted(there - {"__init__", "__main__"})
