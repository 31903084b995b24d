"""A page per task: every command of it is planned; and troubleshooting by symptom, with doctor's findings by their ids."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pdbench.sweep import spec
from pdlib.doctor import CHECKS
from pdlib.variables import VARIABLES

REPO = Path(__file__).resolve().parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")
PAGES = sorted((REPO / "docs" / "tasks").glob("*.md"))
#: what a host would tell, for inventories that leave it to be found; and what Slurm says in an allocation
FOUND = {"rented-container": ["-e", "gpus=4"]}
SAYS = {"slurm": {"SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}}


def lines(page: Path) -> list[str]:
    """Every line of the blocks of a page."""
    return [line.strip() for line in re.findall(r"^    +(\S.*)$", page.read_text(), re.M)]


def planned(page: Path) -> set[tuple[str, ...]]:
    """What has to be planned so that every verb of a page can run: the words behind it, a copied inventory as its original."""
    copied = dict(re.findall(r"cp -r (inventory/\S+) (inventory/\S+)", page.read_text()))
    original = {new: old for old, new in copied.items()}
    found = set()
    for line in lines(page):
        if line.startswith("ansible-playbook "):
            words = shlex.split(line)
            assert (REPO / words[1]).is_file(), line
            found.add(tuple(original.get(word, word) for word in words[2:]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_begins_with_a_command(page: Path) -> None:
    title, blank, first = page.read_text().splitlines()[:3]
    assert (title[:2], blank, first[:4]) == ("# ", "", "    ")
    assert len(page.read_text().splitlines()) < 50


def test_there_is_a_page_for_each_task_and_the_readme_leads_there() -> None:
    assert [page.stem for page in PAGES] == ["one-8-gpu-box", "rented-container", "slurm", "two-mixed-nodes"]
    readme = (REPO / "README.md").read_text()
    for page in (*PAGES, REPO / "docs" / "troubleshooting.md"):
        assert f"({page.relative_to(REPO)})" in readme


@pytest.mark.parametrize(
    ("page", "words"),
    [(page, words) for page in PAGES for words in sorted(planned(page))],
    ids=lambda value: value.stem if isinstance(value, Path) else " ".join(value),
)
def test_every_command_of_a_page_is_planned(page: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    assert {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "-e"} <= VARIABLES.keys()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("ANSIBLE_", "SLURM_"))}
    done = subprocess.run(
        [str(ANSIBLE), "plan.yml", *words, *FOUND.get(page.stem, []), "-e", f"plan_dir={tmp_path}"],
        cwd=REPO, env={**env, **SAYS.get(page.stem, {})}, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "plan.json").is_file(), done.stdout + done.stderr


def test_what_else_the_pages_name_is_there() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (REPO / "Makefile").read_text(), re.M))
    for page in PAGES:
        for line in lines(page):
            assert set(re.findall(r"\bmake ([\w-]+)", line)) <= targets, line
            for name in re.findall(r"pdbench sweep (\S+)", line):
                assert spec.read(REPO / name).repeats >= 1


def test_every_finding_of_doctor_has_a_symptom_and_no_other_is_named() -> None:
    rows = re.findall(
        r"^\| (?!---|what you see)(.+?) \| (.*?) \| (.*?) ?\|$", (REPO / "docs/troubleshooting.md").read_text(), re.M
    )
    assert len(rows) > 30
    named = {name for _, _, cell in rows for name in re.findall(r"`([a-z-]+)`", cell)}
    assert named == set(CHECKS)


@pytest.mark.parametrize(
    "page", [*PAGES, REPO / "docs" / "troubleshooting.md", REPO / "docs" / "formats.md"], ids=lambda p: p.stem
)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]+)#?([^)]*)\)", page.read_text()):
        file = (page.parent / target).resolve()
        assert file.is_file(), target
        heads = {
            re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-")
            for head in re.findall(r"^#+ (.+)$", file.read_text(), re.M)
        }
        assert not anchor or anchor in heads, (target, anchor)
