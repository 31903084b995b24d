#!/usr/bin/env python
"""One file with all that a controller without a registry needs: this checkout, and every wheel of its own and of its hosts.

    make bundle ARGS="-i inventory/h200-local --python 3.12 --glibc 2.39"

There: unpack it, ``make setup``, and use the verbs (docs/hosts.md, "A rented GPU container").
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "library" / "module_utils"))

from pdlib import bench_peers, bench_spec, wheelhouse  # noqa: E402
from pdlib.errors import UserError  # noqa: E402
from pdlib.wheelhouse import Target  # noqa: E402

#: Where `make setup` looks for wheels before it asks a registry.
WHEELS = ".wheels"
CONTROLLER = "requirements/controller.txt"


def target(python: str, machine: str, glibc: str) -> Target:
    """Return what the wheels must fit; raise UserError for a version that is none."""
    for name, value, right in (("--python", python, "3.12"), ("--glibc", glibc, "2.39")):
        if not re.fullmatch(r"[0-9]+\.[0-9]+(\.[0-9]+)?", value):
            raise UserError(f"{name} {value}: expected a version such as {right}")
    # Markers of our locks compare full versions (3.12.0 is not less than 3.12).
    return Target(python if python.count(".") == 2 else f"{python}.0", machine, glibc)


def requirements(inventory: str, extra: list[str]) -> dict[str, list[str]]:
    """Return the requirement files of every virtualenv that the inventory's hosts and this controller need, by name."""
    with tempfile.TemporaryDirectory() as folder:
        # Which virtualenvs there are does not depend on how many GPUs: what the hosts would tell need not be declared.
        assumed = ["-e", "gpus=64", "-e", "ratio=agg", "-e", "address=127.0.0.1"]
        command = ["ansible-playbook", "plan.yml", "-i", inventory, *assumed, *(extra), "-e", f"plan_dir={folder}"]
        done = subprocess.run(
            [str(Path(sys.executable).with_name(command[0])), *command[1:]],
            cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode or not (Path(folder) / "plan.json").exists():
            # An inventory that is not there is no error to Ansible: it has no hosts, and nothing is planned.
            raise UserError(f"{' '.join(command)} made no plan:\n{(done.stdout + done.stderr).strip()[-3000:]}")
        plan = json.loads((Path(folder) / "plan.json").read_text())
    rows = {"controller": [CONTROLLER], bench_spec.VENV: ["requirements/pdbench.txt"]}
    rows.update({f"bench-{tool}": bench_peers.requirements(tool) for tool in bench_peers.PEERS if f"bench_tool={tool}" in extra})
    for entry in plan["hosts"].values():
        rows.update({row["name"]: row["requirements"] for row in entry["installs"]})
    return {name: [step for step in steps if step != "pdbench"] for name, steps in rows.items()}


def checkout() -> list[str]:
    """Return the files of this checkout, as git knows them (new ones, too)."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"a bundle is made from a git checkout: {done.stderr.strip()}")
    return [name for name in sorted(set(done.stdout.split("\0"))) if name and (ROOT / name).exists()]


def commit() -> str:
    """Return the commit that the bundle was made from, with "+" where files differ from it."""
    words = ["git", "-C", str(ROOT)]
    head = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*words, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout.strip()
    return f"{head}+" if changed else head


def make(inventory: str, extra: list[str], wanted: Target, out: Path) -> None:
    """Write the bundle to ``out``."""
    rows = requirements(inventory, extra)
    with tempfile.TemporaryDirectory() as folder:
        wheels = Path(folder) / "wheels"
        for name, steps in rows.items():
            print(f"wheels of {name} for {wanted}", flush=True)
            for step in steps:
                text = (ROOT / step.removeprefix("no-deps:")).read_text(encoding="utf-8")
                wheelhouse.download(name, step, text, wanted, Path(folder) / "listed.txt", wheels, lambda line: None)
        (wheels / "made-from").write_text(f"{commit()}\n")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(out, "w") as tar:
            for name in checkout():
                tar.add(ROOT / name, arcname=f"pd/{name}", recursive=False)
            for path in sorted(wheels.iterdir()):
                tar.add(path, arcname=f"pd/{WHEELS}/{path.name}")
    print(f"{out}: {out.stat().st_size / 1e6:.0f} MB, with wheels of {', '.join(rows)}")


def main() -> int:
    """Read the command line, and make the bundle; 1 when that was not possible, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="make bundle",
        usage='make bundle ARGS="-i INVENTORY [-e NAME=VALUE] [--python 3.12] [--glibc 2.39] [--machine x86_64] [-o FILE]"',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-i", "--inventory", required=True, help="the inventory that will be deployed there")
    parser.add_argument(
        "-e", "--extra-vars", action="append", default=[], help="as of the verbs, where they change what is installed"
    )
    here = platform.libc_ver()[1] or "2.17"
    parser.add_argument("--python", default=".".join(map(str, sys.version_info[:2])), help="Python there (%(default)s)")
    parser.add_argument("--machine", default=platform.machine(), help="machine there (%(default)s)")
    parser.add_argument("--glibc", default=here, help="glibc there, by `ldd --version` (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="the file (.pd/bundle/pd-PYTHON-MACHINE.tar)")
    given = parser.parse_args()
    out = given.output or ROOT / ".pd" / "bundle" / f"pd-{given.python}-{given.machine}.tar"
    extra = [word for value in given.extra_vars for word in ("-e", value)]
    try:
        make(given.inventory, extra, target(given.python, given.machine, given.glibc), out)
    except UserError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
