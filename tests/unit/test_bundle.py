"""A controller that reaches no registry: what its bundle holds, and wheels that come from a folder beside the checkout."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from unit.test_wheelhouse import wheel

from pdlib import wheelhouse
from pdlib.errors import UserError
from pdlib.wheelhouse import Target

REPO = Path(__file__).resolve().parents[2]
THERE = Target("3.12.0", "x86_64", "2.39")


@pytest.fixture
def bundle() -> ModuleType:
    """tools/bundle.py."""
    spec = importlib.util.spec_from_file_location("bundle", REPO / "tools" / "bundle.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_holds_what_the_inventory_s_hosts_and_the_controller_install(bundle: ModuleType) -> None:
    rows = bundle.requirements("inventory/h200-local", [])
    # The engine is there already: runtime is existing.
    assert set(rows) == {"controller", "pdbench", "supervisor", "sglang-router-0.3.2"}
    assert rows["controller"] == ["requirements/controller.txt"]
    assert all((REPO / step).is_file() for steps in rows.values() for step in steps)


def test_a_target_that_is_none_is_refused(bundle: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundle.target("3.12", "x86_64", "2.39") == THERE
    with pytest.raises(UserError, match=r"--python py312: expected a version such as 3\.12"):
        bundle.target("py312", "x86_64", "2.39")
    with pytest.raises(UserError, match="--glibc x"):
        bundle.target("3.12", "x86_64", "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bundle.py", "-i", "inventory/none"])
        assert bundle.main() == 1
    assert "ERROR" in capsys.readouterr().err


def test_wheels_come_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    digest = wheel(own, "a")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    text = f"a==1.0 --hash=sha256:{digest}\n".encode()
    tar = wheelhouse.archive(tmp_path / "house", "engine", ["a.txt"], {"a.txt": text}, THERE, print, own)
    with tarfile.open(tar) as archive:
        assert archive.getnames() == ["a-1.0-py3-none-any.whl"]
    text = f"b==1.0 --hash=sha256:{digest}\n".encode()
    with pytest.raises(
        UserError, match=r"b==1\.0 .*has no wheel for Python 3\.12 .* in .*own, .*make the bundle for this Python"
    ):
        wheelhouse.archive(tmp_path / "house", "engine", ["b.txt"], {"b.txt": text}, THERE, print, own)
