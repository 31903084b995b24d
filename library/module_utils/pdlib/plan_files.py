"""Files of the controller that a plan has to do with: those that it ships, and those that plan.yml writes of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Set, Tuple

from . import plan_file, transfer, units
from .errors import UserError

Json = Dict[str, Any]
_NO_DEPS = "no-deps:"


def _file(root: Path, step: str) -> Path:
    """The requirement file of a step of an install."""
    return root / (step[len(_NO_DEPS) :] if step.startswith(_NO_DEPS) else step)


def check(made: Json, root: Path) -> None:
    """Refuse engine files that cannot be shipped (modules take them as text), and two builds of one transfer engine.

    ``root``: the checkout, to which paths are relative.
    """
    for host, entry in made["hosts"].items():
        for row in entry["installs"]:
            steps = {step: _file(root, step) for step in row["requirements"]}
            # One that is not there is told of where it is installed.
            transfer.check_files(host, {step: file.read_text() for step, file in steps.items() if file.is_file()})
        names = [Path(file).name for file in entry["files"]]
        for file in entry["files"]:
            if names.count(Path(file).name) > 1:
                raise UserError(f"host {host}: engine_files has two files of the name {Path(file).name}")
            try:
                (root / file).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise UserError(f"host {host}: engine_files has {file}, which is not text: give the engine JSON") from None
            except OSError as error:
                raise UserError(f"host {host}: engine_files has {file}: {error.strerror} (relative to the checkout)") from None


def locks(made: Json, root: Path) -> Dict[str, str]:
    """Return host -> a hash of what its engine is installed from."""
    name, found = f"{made['engine']}-{made['engine_version']}", {}
    for host, entry in made["hosts"].items():
        rows = [row for row in entry["installs"] if row["name"] == name]
        files = [_file(root, step) for row in rows for step in row["requirements"]]
        # One that is not there is told of where it is installed.
        texts = [file.read_bytes() for file in files if file.is_file()]
        texts += [json.dumps(row["source"], sort_keys=True).encode() for row in rows if "source" in row]
        found[host] = hashlib.sha256(b"\0".join(texts)).hexdigest()
    return found


def write(folder: Path, made: Json) -> Tuple[bool, int]:
    """Write a plan and its unit files; return whether a file changed, and how many unit files there are."""
    wanted = {"plan.json": json.dumps(made, indent=1) + "\n"}
    for host in made["hosts"]:
        for name, text in units.rendered_files(made, host).items():
            wanted[f"{host}/{name}"] = text
    stale: Set[str] = set()
    if (folder / "plan.json").exists():
        # Only what an earlier plan wrote here goes; everything else in the folder is the user's.
        text = (folder / "plan.json").read_bytes().decode("utf-8", "replace")
        old = plan_file.parse(text, f"{folder}/plan.json", "it is no earlier plan of ours; name another plan_dir")
        stale = {f"{host}/{name}" for host in old["hosts"] for name in units.rendered_files(old, host)} - set(wanted)
    changed = False
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            changed = True
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for name in sorted(stale):
        changed = changed or (folder / name).exists()
        (folder / name).unlink(missing_ok=True)
    return changed, len(wanted) - 1
