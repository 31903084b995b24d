"""The launcher that keeps the key out of command lines, environments and logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "roles" / "worker" / "files" / "with_api_key.py"
KEY = "k3y-0f-the-test"

#: a server's likeness: logs its arguments, and has a spawned child which tells what the parent's parser got
SERVER = """
import json, logging, multiprocessing, pathlib, sys

def seen():
    mine = pathlib.Path("/proc/self")
    return {"argv": sys.argv[1:], "cmdline": (mine / "cmdline").read_text(), "environ": (mine / "environ").read_text()}

def child(queue):
    queue.put(seen())

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("server").info("server_args=%s", sys.argv[1:])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(json.dumps([seen(), queue.get(timeout=60)]))
    process.join()
    sys.exit(7)
"""


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LAUNCHER), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path


def test_module_and_its_children_get_the_key_and_nobody_else_sees_it(tmp_path: Path, key_file: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    done = launch(tmp_path, "--api-key", str(key_file), "server", "--port", "1")
    assert done.returncode == 7, done.stderr
    parent, child = json.loads(done.stdout)
    for process in (parent, child):
        assert process["argv"] == ["--port", "1", f"--api-key={KEY}"]
        assert KEY not in process["cmdline"] + process["environ"]
    assert "server_args=['--port', '1', '--api-key=***']" in done.stderr
    assert KEY not in done.stderr


def test_two_keys_stand_behind_the_module_s_own_arguments(tmp_path: Path, key_file: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    other = tmp_path / "other"
    other.write_text(KEY + "-and-more")
    other.chmod(0o600)
    done = launch(tmp_path, "--api-key", str(key_file), "--admin-api-key", str(other), "server", "--port", "1")
    assert done.returncode == 7, done.stderr
    for process in json.loads(done.stdout):
        assert process["argv"] == ["--port", "1", f"--api-key={KEY}", f"--admin-api-key={KEY}-and-more"]
        assert KEY not in process["cmdline"] + process["environ"]
    assert "server_args=['--port', '1', '--api-key=***', '--admin-api-key=***']" in done.stderr


def test_a_key_that_begins_like_a_flag_is_a_value(tmp_path: Path) -> None:
    """One generated key in 64 does."""
    (tmp_path / "server.py").write_text(
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--api-key', nargs='*')\n"
        "assert p.parse_args().api_key == ['-Abc-7']\n"
    )
    key = tmp_path / "odd"
    key.touch(mode=0o600)
    key.write_text("-Abc-7")
    done = launch(tmp_path, "--api-key", str(key), "server")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    done = launch(tmp_path, "--api-key", str(key_file), "json.tool")
    assert done.returncode == 2
    assert done.stderr == f"with_api_key: {key_file} has mode {mode:04o}: others must not read it, use 0600\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_somebody_elses_file_is_refused(tmp_path: Path, key_file: Path) -> None:
    os.chown(key_file, 12345, -1)
    done = launch(tmp_path, "--api-key", str(key_file), "json.tool")
    assert done.returncode == 2
    assert "belongs to user 12345, not to user 0" in done.stderr


@pytest.mark.parametrize(("content", "words"), [("", 0), ("\n", 0), ("two words", 2), ("a\nb\n", 2)])
def test_a_file_without_exactly_one_word_is_refused(tmp_path: Path, key_file: Path, content: str, words: int) -> None:
    key_file.write_text(content)
    done = launch(tmp_path, "--api-key", str(key_file), "json.tool")
    assert done.returncode == 2
    assert done.stderr == f"with_api_key: {key_file} holds {words} words: it must hold the key and nothing else\n"


def test_no_file_a_folder_a_pipe_and_bytes(tmp_path: Path, key_file: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    key_file.write_bytes(b"\xff\xfe\xfd")
    cannot = "cannot read"
    for path, why in ((tmp_path / "none", cannot), (tmp_path, cannot), (pipe, "regular"), (key_file, cannot)):
        done = launch(tmp_path, "--api-key", str(path), "json.tool")
        assert done.returncode == 2
        assert why in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["no_such_module", "no.such.module"])
def test_a_missing_module_is_named(tmp_path: Path, key_file: Path, module: str) -> None:
    done = launch(tmp_path, "--api-key", str(key_file), module)
    assert (done.returncode, done.stderr) == (2, f"with_api_key: {sys.executable} has no module {module}\n")


@pytest.mark.parametrize("words", [[], ["--api-key", "file"], ["json.tool"], ["--api-key", "file", "--admin-api-key", "file"]])
def test_too_few_arguments(tmp_path: Path, words: list[str]) -> None:
    done = launch(tmp_path, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
