"""`--help` begins with what one types, of every verb and tool; and no page names an option that its verb has not."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pdbench import cli

REPO = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.name for path in (REPO / "tools").glob("*.py"))
PAGES = sorted([REPO / "README.md", *(REPO / "docs").rglob("*.md")])
#: options that stand behind `--` belong to another verb
BEHIND = {"search": "run"}


def helped(verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `pdbench VERB --help` prints."""
    try:
        code: object = cli.main([verb, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    return capsys.readouterr().out


def options(text: str) -> set[str]:
    """The options that a help text or a command names."""
    return set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*|-[a-z](?=[ ,=]))", text))


def typed() -> list[tuple[str, str]]:
    """Every `pdbench VERB ...` in a block of a page, with the page's name; continued lines are one."""
    found = []
    for page in PAGES:
        text = re.sub(r" \\\n +", " ", page.read_text())
        found += [(page.name, line) for line in re.findall(r"^    +(?:\.venv/bin/)?(pdbench [a-z]+.*?)(?:  +#.*)?$", text, re.M)]
    return found


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_begins_with_a_command_that_it_takes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, _, rest = helped(verb, capsys).partition("\n")
    assert first.startswith(f"pdbench {verb} ")
    own, _, behind = first.partition(" (or:")[0].partition(" -- ")
    assert options(own) <= options(rest)
    if behind:
        assert options(behind) <= options(helped(BEHIND[verb], capsys))


def test_the_bare_help_has_every_verb_and_there_are_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    rows = re.findall(r"^  (\w+)\s", capsys.readouterr().out, re.M)
    assert rows == list(cli.VERBS)
    assert set(cli.FIRST) == set(cli.VERBS)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_of_a_tool_begins_with_its_make_target(tool: str) -> None:
    done = subprocess.run(
        [sys.executable, f"tools/{tool}", "--help"], cwd=REPO, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = re.match(r"usage: make (\w+)", done.stdout)
    assert found, done.stdout
    recipe = (REPO / "Makefile").read_text().partition(f"\n{found[1]}:")[2].partition("\n\n")[0]
    assert f"tools/{tool}" in recipe


def test_every_option_of_a_command_on_a_page_is_one_of_its_verb(capsys: pytest.CaptureFixture[str]) -> None:
    commands = typed()
    assert len(commands) > 15
    known = {verb: options(helped(verb, capsys)) for verb in cli.VERBS}
    for page, line in commands:
        own, _, behind = line.partition(" -- ")
        verb = shlex.split(own)[1]
        assert verb in cli.VERBS, (page, line)
        assert options(own) <= known[verb], (page, line)
        if behind:
            assert options(behind) <= known[BEHIND[verb]], (page, line)
