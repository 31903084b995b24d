"""Virtualenvs, made by a small script that stands for Python (making real ones takes many seconds)."""

from __future__ import annotations

import base64
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pdlib import processes, venvs
from pdlib.errors import UserError
from pdlib.steps import Outcome

#: `python -m venv DIR` makes a bin/python that notes what pip is asked for, and fails or waits as the file's text says.
STUB = """#!/bin/sh
test "$2" = venv || exit 9
mkdir -p "$3/bin" && cat > "$3/bin/python" <<'END'
#!/bin/sh
for last in "$@"; do :; done
echo "$@" >> "$(dirname "$0")/asked"
test ! -d "$last" || cat "$last/pyproject.toml" > "$(dirname "$0")/seen"
cat "$last"
grep -q slow "$last" && sleep 1
grep -q broken "$last" && exit 1
exit 0
END
chmod +x "$3/bin/python"
"""


class Host:
    """An install_dir and a state_dir, and the step that a module would call."""

    def __init__(self, folder: Path, state: str = "state"):
        self.install, self.state = folder / "install it", folder / state
        self.python = folder / "python"
        if not self.python.exists():
            self.python.write_text(STUB)
            self.python.chmod(0o755)

    def step(self, files: dict[str, str], check: bool = False, resumed: bool = False, name: str = "engine") -> Outcome:
        rows = [{"name": name, "requirements": list(files)}]
        encoded = {k.replace("no-deps:", ""): base64.b64encode(v.encode()).decode() for k, v in files.items()}
        return venvs.step(str(self.install), str(self.state), str(self.python), rows, encoded, check, resumed)

    def finish(self, files: dict[str, str]) -> list[Outcome]:
        outcomes = [self.step(files)]
        while not outcomes[-1].done:
            outcomes.append(self.step(files, resumed=True))
            assert len(outcomes) < 50
        return outcomes

    def asked(self) -> list[str]:
        return (self.install / "engine" / "bin" / "asked").read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setattr(venvs, "STEP_S", 5.0)
    return Host(tmp_path)


def test_requirements_are_installed_in_turn_and_stamped(machine: Host) -> None:
    files = {"requirements/a.txt": "one", "no-deps:requirements/b.txt": "two", "pdbench": "a wheel"}
    (outcome,) = machine.finish(files)
    assert outcome.changed == ["made install_dir and state_dir", "installed engine"]
    words = [line.split(" --disable-pip-version-check ")[1] for line in machine.asked()]
    folder = f"{machine.install}/engine.install"
    assert words == [f"-r {folder}/a.txt", f"--no-deps -r {folder}/b.txt", f"--no-deps {folder}/pdbench-0.1.0-py3-none-any.whl"]
    assert oct((machine.install / ".pd").parent.stat().st_mode)[-3:] == "700"


def test_what_is_there_as_wanted_is_left_alone(machine: Host) -> None:
    machine.finish({"a.txt": "one"})
    again = machine.step({"a.txt": "one"})
    assert again.done
    assert again.changed == []
    assert len(machine.asked()) == 1
    (other,) = machine.finish({"a.txt": "two"})
    assert other.changed == ["installed engine"]
    assert len(machine.asked()) == 1, "made anew, not on top"


def test_check_mode_changes_nothing(machine: Host) -> None:
    outcome = machine.step({"a.txt": "one"}, check=True)
    assert (outcome.done, outcome.changed) == (True, ["would install engine"])
    assert not machine.install.exists()
    assert not machine.state.exists()
    machine.finish({"a.txt": "one"})
    assert machine.step({"a.txt": "one"}, check=True).changed == []


def test_a_failure_carries_the_end_of_the_log_and_the_next_try_begins_anew(machine: Host) -> None:
    outcome = machine.step({"a.txt": "broken: no such package"})
    assert not outcome.done
    with pytest.raises(UserError) as refused:
        machine.step({"a.txt": "broken: no such package"}, resumed=True)
    message = str(refused.value)
    assert message.startswith("engine did not install. The end of ")
    assert "engine.install/log:" in message
    assert message.endswith("broken: no such package")
    assert machine.step({"a.txt": "good now"}).done


def test_what_was_there_is_back_when_the_new_one_does_not_come_to_be(machine: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.finish({"a.txt": "one"})
    before = machine.asked()
    machine.step({"a.txt": "broken"})
    with pytest.raises(UserError, match="did not install"):
        machine.step({"a.txt": "broken"}, resumed=True)
    assert machine.asked() == before
    assert machine.step({"a.txt": "one"}).changed == [], "it is as it was"
    monkeypatch.setattr(venvs, "STEP_S", 0.1)
    machine.step({"a.txt": "slow"})
    working = processes.ours(str(machine.state), "install-engine")
    processes.kill([p.pid for p in working], 5)
    monkeypatch.setattr(venvs, "STEP_S", 10.0)
    machine.step({"a.txt": "broken"})
    with pytest.raises(UserError, match="did not install"):
        machine.step({"a.txt": "broken"}, resumed=True)
    assert machine.asked() == before, "also when an installer was killed in between"
    assert not (machine.install / "engine.old").exists()


def test_progress_says_what_the_installer_says(machine: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venvs, "STEP_S", 0.4)
    outcome = machine.step({"a.txt": "slow: Collecting torch (from -r a.txt)"})
    assert not outcome.done
    assert outcome.message.startswith("installing engine (")
    assert outcome.message.endswith("s): slow: Collecting torch")
    monkeypatch.setattr(venvs, "STEP_S", 10.0)
    assert machine.step({"a.txt": "slow: Collecting torch (from -r a.txt)"}, resumed=True).done


def test_two_hosts_that_share_an_install_dir_install_once(machine: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Host(machine.python.parent, "another state")
    monkeypatch.setattr(venvs, "STEP_S", 0.2)
    files = {"a.txt": "slow"}
    first, second = machine.step(files), other.step(files)
    assert "installed engine" in first.changed
    assert "installed engine" not in second.changed
    monkeypatch.setattr(venvs, "STEP_S", 10.0)
    assert other.step(files, resumed=True).done
    assert machine.step(files, resumed=True).done
    assert len(machine.asked()) == 1


def test_two_that_come_at_the_same_moment_install_once(machine: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    start, both = venvs.Venv.start, threading.Barrier(2)

    def slow_start(venv: venvs.Venv) -> None:
        time.sleep(0.3)
        start(venv)

    monkeypatch.setattr(venvs.Venv, "start", slow_start)
    changed: list[str] = []

    def come(host: Host) -> None:
        both.wait()
        changed.extend(host.step({"a.txt": "one"}).changed)

    threads = [threading.Thread(target=come, args=(h,)) for h in (machine, Host(machine.python.parent, "another state"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert changed.count("installed engine") == 1
    assert len(machine.asked()) == 1


def test_an_installer_without_a_command_line_yet_is_running(machine: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel shows an empty one for a moment after exec; whoever looks then must not start a second installer."""
    monkeypatch.setattr(venvs, "STEP_S", 0.1)
    machine.step({"a.txt": "slow"})
    venv = venvs.Venv(str(machine.install), str(machine.state), "", {"name": "engine", "requirements": []}, {})
    read_text = Path.read_text

    def without_commands(path: Path, *args: Any, **options: Any) -> str:
        return "" if path.name == "cmdline" else read_text(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", without_commands)
    assert venv.running()
    processes.kill([p.pid for p in processes.ours(str(machine.state))], 5)
    assert not venv.running()


def test_an_installer_that_was_killed_is_begun_anew_by_the_next_deploy(machine: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venvs, "STEP_S", 0.1)
    machine.step({"a.txt": "slow"})
    working = processes.ours(str(machine.state), "install-engine")
    assert working
    processes.kill([p.pid for p in working], 5)
    monkeypatch.setattr(venvs, "STEP_S", 10.0)
    assert machine.step({"a.txt": "slow"}).done


def test_an_installer_that_ends_between_two_looks_did_not_fail(machine: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is asked first, `is it running` or `is it there`: the installer ends right after the first question."""
    machine.finish({"a.txt": "one"})
    stamp = machine.install / "engine" / ".pd-stamp"
    text = stamp.read_text()
    looks: list[str] = []

    def look(kind: str) -> bool:
        ended = bool(looks)
        looks.append(kind)
        if ended:
            stamp.write_text(text)
        return (kind == "ready") == ended

    stamp.unlink()
    monkeypatch.setattr(venvs.Venv, "ready", lambda self: look("ready"))
    monkeypatch.setattr(venvs.Venv, "running", lambda self: look("running"))
    assert machine.step({"a.txt": "one"}, resumed=True).done


def test_a_folder_of_others_is_refused(machine: Host) -> None:
    machine.install.mkdir()
    (machine.install / "precious").write_text("x")
    with pytest.raises(UserError, match="holds files that are not ours: set another state_dir or install_dir"):
        machine.step({"a.txt": "one"})
    assert [p.name for p in machine.install.iterdir()] == ["precious"]


def test_pip_itself_says_why_it_cannot_install(machine: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pip")
    monkeypatch.setattr(venvs, "STEP_S", 60.0)
    machine.python.write_text(f'#!/bin/sh\nmkdir -p "$3/bin" && ln -s "{sys.executable}" "$3/bin/python"\n')
    files = {"a.txt": "--no-index\nno-such-package-of-ours==1\n"}
    assert not machine.step(files).done
    with pytest.raises(UserError, match=r"did not install(.|\n)*no-such-package-of-ours==1"):
        machine.step(files, resumed=True)


def test_services_of_another_user_reach_what_sudo_with_a_strict_umask_makes(machine: Host) -> None:
    before = os.umask(0o077)
    try:
        rows, files = [{"name": "engine", "requirements": ["a.txt"]}], {"a.txt": base64.b64encode(b"one").decode()}
        outcome = venvs.step(
            str(machine.install), str(machine.state), str(machine.python), rows, files, False, False, shared=True
        )
        assert outcome.done
        modes = {path.stat().st_mode & 0o777 for path in (machine.install, machine.state)}
        assert modes == {0o711}, "known paths may be reached, folders not listed"
        for path in (machine.state / "run", machine.install / "engine" / "bin", machine.install / "engine" / "bin" / "python"):
            assert path.stat().st_mode & 0o005 == 0o005, path
    finally:
        os.umask(before)


def test_nixl_is_built_from_a_copy_of_its_sources_with_the_tools_of_another_virtualenv(machine: Host, tmp_path: Path) -> None:
    source, ucx = tmp_path / "nixl-src", tmp_path / "ucx"
    source.mkdir()
    (source / "pyproject.toml").write_text('[project]\nname = "nixl-cu12"\nversion = "1.4.0"\n')
    tools = {"name": "nixl-build", "requirements": ["tools.txt"]}
    row = {"name": "engine", "requirements": ["a.txt"]}
    built = {"path": str(source), "ucx": str(ucx), "name": "nixl-cu13", "tools": "nixl-build"}
    encoded = {name: base64.b64encode(b"one").decode() for name in ("tools.txt", "a.txt")}

    def run(resumed: bool) -> Outcome:
        rows: list[dict[str, Any]] = [tools, {**row, "source": built}]
        return venvs.step(str(machine.install), str(machine.state), str(machine.python), rows, encoded, False, resumed)

    def finish() -> None:
        resumed = False
        while not run(resumed).done:
            resumed = True

    with pytest.raises(UserError, match=r"(?s)engine did not install.*ucx_prefix=\S+/ucx: no include/ucp"):
        finish()
    (ucx / "include/ucp/api").mkdir(parents=True)
    (ucx / "include/ucp/api/ucp.h").touch()
    finish()
    (asked,) = [line for line in (machine.install / "nixl-build/bin/asked").read_text().splitlines() if " wheel " in line]
    assert f"--no-build-isolation -w {machine.install}/engine.install/nixl-wheel" in asked
    assert asked.endswith(f"--config-settings=setup-args=-Ducx_path={ucx} {machine.install}/engine.install/nixl")
    assert machine.asked()[-1].startswith("-m pip --no-input --disable-pip-version-check install --no-deps")
    assert (source / "pyproject.toml").read_text().splitlines()[1] == 'name = "nixl-cu12"', "the user's own is left as it is"
    assert 'name = "nixl-cu13"' in (machine.install / "nixl-build/bin/seen").read_text()
    one = venvs.Venv("/i", "/s", "p", row, encoded).stamp()
    assert venvs.Venv("/i", "/s", "p", {**row, "source": built}, encoded).stamp() != one
