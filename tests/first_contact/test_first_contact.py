"""README.md to the letter, by a stranger on a bare Debian and a bare Ubuntu: `make test-first-contact` (root, five minutes)."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from first_contact import root
from lab import base
from lab.common import REPO, run

from pdlib import processes

USER = "stranger"
#: What stays after teardown.yml: the controller's own, installs that the next deploy takes again, and results.
STAYS = (".venv/", "bench/pdbench.egg-info/", ".pd/install", ".pd/dist", "results/", ".ansible/")
CHECKED = '{command}\ncode=$?; echo "@@ $code $SECONDS s: {name}"; [ $code = 0 ] || exit $code\n'


def readme() -> tuple[str, list[str]]:
    """Return the command that README.md has root type first, and those that it begins with."""
    text = (REPO / "README.md").read_text()
    blocks = re.findall(r"(?:^    .*\n)+", text, re.M)
    first = [line.strip() for line in blocks[0].splitlines()]
    packages = [line.strip() for block in blocks for line in block.splitlines() if line.strip().startswith("apt-get ")]
    assert len(packages) == 1, packages
    return packages[0], first


def unfit(distribution: str) -> str:
    """Return why this machine cannot make such a root, "" when it can."""
    if reason := base.unfit():
        return reason
    if not root.sources(distribution):
        asked = root.ASKED.format(distribution.upper())
        return f"this machine's apt has no source of {distribution.title()}: name a file with one in {asked}"
    taken = processes.taken_ports([(address, port) for address in ("127.0.0.1", "127.0.0.2") for port in (8000, 30000, 30001)])
    return f"the default ports of README's commands are taken: {taken}" if taken else ""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder beside the lab's; what is below it is the root's users', so that it goes as a whole."""
    (REPO / ".pd").mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="first-contact-", dir=REPO / ".pd"))
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made)


def files(home: Path) -> set[str]:
    """The files of the clone, but for what stays."""
    found = (str(path.relative_to(home)) for path in home.rglob("*"))
    return {name for name in found if not f"{name}/".startswith(STAYS) and "__pycache__" not in name}


@pytest.mark.parametrize("distribution", ["debian", "ubuntu"])
def test_a_stranger_types_what_the_readme_says(distribution: str, folder: Path) -> None:
    if reason := unfit(distribution):
        pytest.skip(reason)
    packages, commands = readme()
    assert [word for line in commands for word in ("deploy_pd.yml", "bench.yml", "teardown.yml") if word in line] == [
        "deploy_pd.yml", "bench.yml", "teardown.yml",
    ]  # fmt: skip
    settings, shared = root.pip_settings()
    found = root.sources(distribution)
    assert found
    bare = root.make(folder, found)
    with root.inside(bare, []) as there:
        got = there.script(f"{{ {packages}; }} || exit\nuseradd -m -s /bin/bash {USER}\n")
        assert got.returncode == 0, got.stdout[-3000:]
    (bare / "etc/pip.conf").write_text(settings)
    home = bare / "home" / USER / "pd"
    run("git", "clone", "-q", "--no-hardlinks", REPO, home)
    with root.inside(bare, shared) as there:
        assert there.script(f"chown -R {USER}: /home/{USER}").returncode == 0
        before = files(home)
        lines = [CHECKED.format(command=line, name=line.replace('"', "").replace("$", "")) for line in commands]
        typed = there.script("".join(["cd pd\n", *lines]), USER, 1500)
        print("\n".join(line for line in typed.stdout.splitlines() if line.startswith("@@")))
        assert typed.returncode == 0, typed.stdout[-6000:]
        assert typed.stdout.count("@@ 0 ") == len(commands)
        verdict = json.loads((home / "results/latest/validity.json").read_text())
        assert verdict["valid"] is True, verdict
        assert (home / "results/latest/report.html").stat().st_size > 10_000
        assert there.processes() == []
        elsewhere = f"find / -xdev -user {USER} -not -path '/home/*' -not -path '/proc/*' -not -path '/var/mail/*'"
        assert there.script(elsewhere).stdout == ""
    assert files(home) - before <= {".pd", ".pd/deployed"}
    assert run("git", "-C", home, "-c", f"safe.directory={home}", "status", "--porcelain").stdout == ""


def test_the_readme_names_its_commands_and_packages_where_this_test_reads_them() -> None:
    packages, commands = readme()
    assert packages.startswith("apt-get update && apt-get install ")
    assert commands[0] == "make setup && . .venv/bin/activate"
    assert len(commands) == 4


def test_settings_of_pip_reach_the_root_with_the_folders_that_they_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path}/wheels {tmp_path}/gone")
    monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "77")
    text, shared = root.pip_settings()
    assert text.startswith("[global]\n")
    assert f"find-links = {tmp_path}/wheels {tmp_path}/gone\n" in text
    assert "default-timeout = 77\n" in text
    assert tmp_path / "wheels" in shared
    assert tmp_path / "gone" not in shared
