"""Unit files: what systemd and /bin/sh make of them is exactly the plan's argv and environment."""

from __future__ import annotations

import configparser
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.plans import Json, host, plan

from pdlib import units
from pdlib.processes import work_dir

#: Everything but what no command line can hold, and line ends other than \n.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from("\n\t $%\"'\\;#`{}-="), max_size=12)
NASTY = ["", " ", "a b", "$HOME", "$$", "${X}", "%n", "%%", "100%", '"', "'", "\\", "a\\", "\\n", "a\nb", "\t", ";", "a;b", "#x",
         "--", "`id`", "$(id)", "{}", "é\u2028ü", "\U0001f600", "-", "=", "&&", ">", "*", "~", '{"a": [1, "x y"]}']  # fmt: skip
ARGS = st.lists(st.one_of(TEXT, st.sampled_from(NASTY)), max_size=6)
ENV = st.dictionaries(st.from_regex(r"PD_[A-Z]{1,6}", fullmatch=True), st.one_of(TEXT, st.sampled_from(NASTY)), max_size=4)


def unit(argv: list[str], env: dict[str, str] | None = None, **more: Any) -> Json:
    return {"name": "pd-prefill-0", "title": "prefill-0", "argv": argv, "env": env or {}, "members": [], **more}


# ---------------------------------------------------------------- systemd, by the rules of systemd.service(5), systemd.syntax(7)


def logical_lines(text: str) -> list[str]:
    """Lines with continuations joined and comments (also those amid a continuation) left out."""
    lines: list[str] = []
    open_line = ""
    for line in text.split("\n"):
        if line.lstrip().startswith(("#", ";")):
            continue
        backslashes = len(line) - len(line.rstrip("\\"))
        if backslashes % 2:
            open_line += line[:-1] + " "
            continue
        lines.append(open_line + line)
        open_line = ""
    assert not open_line
    return lines


ESCAPES = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "t": "\t", "s": " ", "r": "\r"}


def words(text: str) -> list[str]:
    """Split as systemd does: quotes, C escapes inside and outside of them, then %% and $$ (alone they would be expanded)."""
    found: list[str] = []
    i, end = 0, len(text)
    while True:
        while i < end and text[i] in " \t\n\r":
            i += 1
        if i == end:
            return [resolve(word) for word in found]
        assert not (text[i] == ";" and (i + 1 == end or text[i + 1] in " \t")), "a lone ; begins another command"
        word, quote = "", ""
        while i < end:
            c = text[i]
            if c == "\\":
                assert text[i + 1] in ESCAPES, f"systemd knows no escape \\{text[i + 1]}"
                word += ESCAPES[text[i + 1]]
                i += 1
            elif quote:
                if c == quote:
                    quote = ""
                    assert i + 1 == end or text[i + 1] in " \t\n\r"
                else:
                    word += c
            elif c in "\"'" and not word:
                quote = c
            elif c in " \t\n\r":
                break
            else:
                assert c not in "\"'", "a quote amid a word"
                word += c
            i += 1
        assert not quote
        found.append(word)


def resolve(word: str) -> str:
    for sign in "%$":
        assert word.count(sign * 2) * 2 == word.count(sign), f"{sign} would be expanded in {word!r}"
        word = word.replace(sign * 2, sign)
    return word


def setting(text: str, name: str) -> str:
    (line,) = [line for line in logical_lines(text) if line.startswith(f"{name}=")]
    return line.partition("=")[2]


@given(ARGS)
@settings(max_examples=300, deadline=None)
def test_systemd_reads_back_the_argv(args: list[str]) -> None:
    argv = ["/opt/pd/python", *args]
    text = units.systemd_unit(unit(argv), "/var/lib/pd", "3p1d")
    assert words(setting(text, "ExecStart")) == argv
    assert setting(text, "WorkingDirectory") == work_dir("/var/lib/pd", "pd-prefill-0")


def environment(text: str) -> dict[str, str]:
    """Read an EnvironmentFile as systemd does: in double quotes a backslash escapes only one of "\\`$ and a line end."""
    found: dict[str, str] = {}
    i = 0
    while i < len(text):
        if text[i] in "#;":
            i = text.index("\n", i) + 1
            continue
        key, _, _ = text[i:].partition("=")
        i += len(key) + 1
        assert text[i] == '"'
        i, value = i + 1, ""
        while text[i] != '"':
            if text[i] == "\\":
                i += 1
                value += text[i] if text[i] in '"\\`$' else "" if text[i] == "\n" else "\\" + text[i]
            else:
                value += text[i]
            i += 1
        assert text[i + 1] == "\n"
        found[key] = value
        i += 2
    return found


@given(ENV)
@settings(max_examples=200, deadline=None)
def test_systemd_reads_back_the_environment(env: dict[str, str]) -> None:
    assert environment(units.systemd_env(unit(["/x"], env))) == env


# ---------------------------------------------------------------- the script


@given(ARGS, ENV)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("folder", ["state", 'it\'s $HOME %n "here" '])
def test_the_script_runs_exactly_the_argv_in_exactly_the_environment(
    tmp_path: Path, folder: str, args: list[str], env: dict[str, str]
) -> None:
    state = tmp_path / folder
    Path(work_dir(str(state), "pd-prefill-0")).mkdir(parents=True, exist_ok=True)
    shell = [str(shutil.which("sh")), "-c", 'pwd -P; for a in "$@"; do printf "%s\\0" "$a"; done; printf "\\1"; env -0', "name"]
    script = state / "run.sh"
    script.write_text(units.run_script(unit([*shell, *args], env), str(state)))
    done = subprocess.run(["/bin/sh", str(script)], capture_output=True, check=True, env={"PATH": os.environ["PATH"]}, cwd="/")
    folder_line, _, rest = done.stdout.decode().partition("\n")
    seen, _, seen_env = rest.partition("\1")
    assert seen.split("\0")[:-1] == args
    assert Path(folder_line) == Path(work_dir(str(state), "pd-prefill-0")).resolve()
    assert {k: v for k, _, v in (row.partition("=") for row in seen_env.split("\0")) if k.startswith("PD_")} == env


def test_the_script_fails_when_its_folder_is_gone(tmp_path: Path) -> None:
    script = units.run_script(unit(["/bin/echo", "ran"]), str(tmp_path))
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ran" not in done.stdout


def test_a_person_can_read_the_command_flag_by_flag() -> None:
    script = units.run_script(unit(["/py", "-m", "x", "--port", "1", "--flag", "--list", "a", "b"]), "/s")
    assert script.endswith("exec /py -m x \\\n  --port 1 \\\n  --flag \\\n  --list a b\n")


# ---------------------------------------------------------------- supervisord


@pytest.mark.parametrize("state", ["/var/lib/pd", "/srv/a b/it's pd"])
def test_supervisord_reads_its_files(state: str) -> None:
    """supervisord's own parser expands %(...)s and splits the command as a shell does."""
    program = configparser.ConfigParser(inline_comment_prefixes=(";", "#"))
    program.read_string(units.supervisor_program(unit(["/x"]), state))
    row = program["program:pd-prefill-0"]
    assert shlex.split(row["command"]) == ["/bin/sh", f"{state}/units/pd-prefill-0.sh"]
    assert row["directory"] == work_dir(state, "pd-prefill-0")
    assert row["stdout_logfile"] == f"{state}/log/pd-prefill-0.log"
    assert row["autostart"] == "false", "only the reconciler starts units"
    # As often as systemd: five starts in StartLimitIntervalSec are five that last a fifth of it each.
    unit_file = units.systemd_unit(unit(["/x"]), state, "1p1d")
    starts, seconds = int(setting(unit_file, "StartLimitBurst")), int(setting(unit_file, "StartLimitIntervalSec"))
    assert (int(row["startretries"]), int(row["startsecs"])) == (starts - 1, seconds // starts)
    conf = configparser.ConfigParser(inline_comment_prefixes=(";", "#"))
    conf.read_string(units.supervisor_conf(state, units.socket_path(state)))
    assert conf["unix_http_server"]["file"] == units.socket_path(state)
    assert conf["supervisord"]["pidfile"] == f"{state}/supervisord.pid"
    assert "inet_http_server" not in conf, "no network port"
    assert len(conf["include"]["files"].split()) == 1


def test_the_socket_always_fits() -> None:
    for length in range(1, 200):
        state = "/" + "x" * length
        path = units.socket_path(state)
        assert len(f"{path}.{2**22}".encode()) <= 107
        assert path == units.socket_path(state)
    assert units.socket_path("/var/lib/pd") == "/var/lib/pd/supervisor.sock"
    assert units.socket_path("/" + "x" * 150) != units.socket_path("/" + "y" * 150)


# ---------------------------------------------------------------- units of a plan


HOSTS = {"n1": host(1), "n2": host(2)}


def test_units_of_a_host_are_its_ranks_and_the_router() -> None:
    made = plan(HOSTS, "2p1d", prefill=["n1"], decode=["n2"])
    first = {u["name"]: u for u in units.host_units(made, "n1")}
    assert list(first) == ["pd-prefill-0", "pd-prefill-1", "pd-router"]
    assert [u["name"] for u in units.host_units(made, "n2")] == ["pd-decode-0"]
    assert first["pd-prefill-0"]["ports"] == [30000, 8998]
    assert first["pd-prefill-0"]["health_url"] == "http://127.0.0.1:30000/ready"
    assert first["pd-router"]["ports"] == [8000, 29000]
    assert first["pd-router"]["health_url"] == "http://127.0.0.1:8000/health"
    assert first["pd-router"]["argv"][-len(first["pd-router"]["members"]) :] == first["pd-router"]["members"]
    assert units.host_units(made, "elsewhere") == []


def test_rendered_files_are_those_of_both_managers() -> None:
    made = plan(HOSTS, "2p1d", prefill=["n1"], decode=["n2"])
    names = {"pd.target", "supervisord.conf"}
    names |= {f"{n}.{end}" for n in ("pd-prefill-0", "pd-prefill-1", "pd-router") for end in ("service", "env", "conf", "sh")}
    files = units.rendered_files(made, "n1")
    assert set(files) == names
    assert "Description=PD prefill-0 (2p1d)" in files["pd-prefill-0.service"]
    for name, text in files.items():
        assert text.endswith("\n"), name
        if name.endswith(".service"):
            argv = next(u["argv"] for u in units.host_units(made, "n1") if u["name"] == name[: -len(".service")])
            assert words(setting(text, "ExecStart")) == argv


@given(ARGS, ENV, st.text(max_size=8))
@settings(max_examples=100, deadline=None)
def test_identity_is_what_needs_a_restart(args: list[str], env: dict[str, str], secret: str) -> None:
    one = unit(["/x", *args], env)
    same = units.identity(one, secret)
    assert units.identity(unit(["/x", *args], dict(reversed(env.items()))), secret) == same
    for members in (["--prefill", "u", "1"], ["--decode", "v"]):
        routed = unit(["/x", *args, *members], env, members=members)
        assert units.identity(routed, secret) == same, "members do not count"
    assert units.identity(unit(["/x", *args, "more"], env), secret) != same
    assert units.identity(unit(["/y", *args], env), secret) != same
    assert units.identity(unit(["/x", *args], {**env, "OTHER": "1"}), secret) != same
    assert units.identity(one, secret + "x") != same
    assert not secret or secret not in same or len(secret) < 3


def test_the_routers_identity_survives_a_change_of_ratio() -> None:
    before = plan(HOSTS, "3p1d")
    after = plan(HOSTS, "1p2d", current=before)
    routers = [next(u for u in units.host_units(p, "n1") if u["name"] == "pd-router") for p in (before, after)]
    assert routers[0]["argv"] != routers[1]["argv"]
    assert units.identity(routers[0]) == units.identity(routers[1])
