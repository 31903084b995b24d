"""`make audit` looks up what the locks pin, and says so when it cannot."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[2]
TOLD = {"dependencies": [
    {"name": "a", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}, {"id": "GHSA-2", "fix_versions": []}]},
    {"name": "b", "version": "2", "vulns": []}, {"name": "c", "skip_reason": "c was not found"},
]}  # fmt: skip


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    found = importlib.util.spec_from_file_location("audit", REPO / "tools" / "audit.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def program(folder: Path, text: str) -> Path:
    path = folder / "pip-audit"
    path.write_text(f"#!{sys.executable}\nimport sys\n{text}\n")
    path.chmod(0o755)
    return path


def test_what_a_lock_pins(audit: ModuleType) -> None:
    text = "A==1.0 ; x \\\n    --hash=sha256:0\nb[c]==2.1+cu129\n    # via a\n-c x.txt\nd>=3\nA==1.0\n"
    assert audit.pinned(text) == ["a==1.0", "b==2.1"]
    for lock in (REPO / "requirements").glob("*.txt"):
        assert audit.pinned(lock.read_text()), lock.name


def test_what_is_known_is_listed(audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = program(tmp_path, f"print({json.dumps(json.dumps(TOLD))}); sys.exit(1)")
    assert audit.main(["--program", str(fake), "--lock", "hub.txt"]) == 1
    said = capsys.readouterr().out
    assert "hub.txt: 2 known\n  a 1.0: PYSEC-1; mended in 1.1\n  a 1.0: GHSA-2\n  not looked up: c was not found\n" in said
    fake = program(tmp_path, """print('{"dependencies": []}')""")
    assert audit.main(["--program", str(fake), "--lock", "hub.txt"]) == 0


def test_without_a_network_it_says_so(audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = program(tmp_path, "sys.exit('ConnectionError: no route')")
    assert audit.main(["--program", str(fake), "--lock", "hub.txt"]) == 2
    said = capsys.readouterr().err
    assert "requirements/hub.txt could not be looked up" in said
    assert "ConnectionError: no route" in said
    every = {"dependencies": [{"name": str(n), "skip_reason": "not found on PyPI"} for n in range(99)]}
    fake = program(tmp_path, f"print({json.dumps(json.dumps(every))})")
    assert audit.main(["--program", str(fake), "--lock", "hub.txt"]) == 2, "a mirror knows of none"
    assert "not found on PyPI" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        audit.main(["--lock", "no-such.txt"])
    assert refused.value.code == 2
