"""What the yardstick needs, under .pd/yardstick: the truth server (gcc), the peers' virtualenvs, a tokenizer.

Only what changed is made again.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

from yardstick.tools import HERE, HOME, ROOT

#: virtualenv -> requirement files; those that end in no-deps.txt go in alone, the others with their hashes
VENVS = {
    "sglang": ("requirements/yardstick-sglang.txt", "requirements/yardstick-sglang-no-deps.txt"),
    "aiperf": ("requirements/yardstick-aiperf.txt",),
}


class CannotInstallError(Exception):
    """Nothing can be measured here; the message says why."""


def install() -> list[str]:
    """Make what is missing; return one sentence for each peer that could not be installed. Raise CannotInstallError."""
    HOME.mkdir(parents=True, exist_ok=True)
    _truth_server()
    problems = [f"{name}: {why}" for name in VENVS if (why := _venv(name))]
    tokenizer, hub = HOME / "tokenizer", HOME / "hub"
    if not (HOME / "sglang.failed").exists() and not (tokenizer / "tokenizer.json").exists():
        _say("a tokenizer")
        python = str(HOME / "sglang" / "bin" / "python")
        _call([python, str(HERE / "peers" / "make_tokenizer.py"), str(tokenizer), str(hub)])
    return problems


def _say(what: str) -> None:
    print(f"bench-client: making {what} under {HOME.relative_to(ROOT)}", flush=True)


def _call(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise CannotInstallError(f"{' '.join(argv[:4])} ...: {' '.join(said[-2:]) or f'exit code {done.returncode}'}")


def _truth_server() -> None:
    source, binary = HERE / "truthd.c", HOME / "truthd"
    if binary.exists() and binary.stat().st_mtime > source.stat().st_mtime:
        return
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        raise CannotInstallError("gcc is needed for the truth server: apt-get install gcc libc6-dev")
    _say("the truth server")
    _call([compiler, "-O2", "-o", str(binary), str(source)])


def _venv(name: str) -> str:
    """Make a peer's virtualenv when its requirements changed; return why that failed, "" when it is there."""
    files = [ROOT / file for file in VENVS[name]]
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files) + sys.version.encode()).hexdigest()
    stamp, failed = HOME / name / ".requirements", HOME / f"{name}.failed"
    if stamp.exists() and stamp.read_text() == wanted:
        return ""
    _say(f"the virtualenv of {name} (minutes)")
    failed.unlink(missing_ok=True)
    pip = [str(HOME / name / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    try:
        _call([sys.executable, "-m", "venv", "--clear", str(HOME / name)])
        for file in files:
            _call([*pip, "--no-deps" if file.name.endswith("no-deps.txt") else "--require-hashes", "-r", str(file)])
    except CannotInstallError as why:
        failed.write_text(f"{why}\n")
        return str(why)
    stamp.write_text(wanted)
    return ""
