"""Wheels for another Python and machine: which requirements hold there, what pip is asked for, what arrives on the host."""

from __future__ import annotations

import base64
import hashlib
import io
import platform
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

from pdlib import venvs, wheelhouse
from pdlib.errors import UserError
from pdlib.steps import Outcome
from pdlib.wheelhouse import Target

REPO = Path(__file__).resolve().parents[2]
HERE = Target(platform.python_version(), platform.machine(), "2.36")
ARM = Target("3.12.4", "aarch64", "2.39")
SAID: list[str] = []


def wheel(folder: Path, name: str, version: str = "1.0", tag: str = "py3-none-any", requires: str = "") -> str:
    """A wheel that pip takes; returns its hash."""
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": about + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }  # fmt: skip
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
        archive.writestr(f"{info}/RECORD", record)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry: a folder, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_CONFIG_FILE", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    SAID.clear()
    return folder


def fetch(folder: Path, target: Target, **steps: str) -> list[str]:
    """The wheels of a wheelhouse; a step's name is its file (``_`` for ``:``)."""
    contents = {name.replace("_", ":"): text.encode() for name, text in steps.items()}
    tar = wheelhouse.archive(folder / "house", "engine", list(contents), contents, target, SAID.append)
    with tarfile.open(tar) as archive:
        return archive.getnames()


def test_markers_are_those_of_the_target() -> None:
    text = (
        "a==1 ; sys_platform == 'linux' \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n    # via x\n"
        "b==2 ; platform_machine == 'x86_64' --hash=sha256:cc\n"
        "c[extra]==3 ; platform_machine == 'aarch64' and python_full_version >= '3.12' --hash=sha256:dd  # why\n"
        "d==4 ; sys_platform == 'win32' --hash=sha256:ee\n"
        "--prefer-binary\n"
    )
    narrow, hashed = wheelhouse.narrowed(text, ARM)
    assert narrow.splitlines() == [
        "a==1 --hash=sha256:aa --hash=sha256:bb", "c[extra]==3 --hash=sha256:dd", "--prefer-binary",
    ]  # fmt: skip
    assert hashed
    assert wheelhouse.narrowed("a==1\nb==2 --hash=sha256:cc", ARM) == ("a==1\nb==2 --hash=sha256:cc\n", False)
    with pytest.raises(UserError, match="is no requirement"):
        wheelhouse.narrowed("../some/folder --hash=sha256:cc", ARM)


@pytest.mark.parametrize("path", sorted((REPO / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_every_lock_of_ours_can_be_narrowed(path: Path) -> None:
    for target in (Target("3.11.9", "x86_64", "2.36"), ARM):
        narrow, hashed = wheelhouse.narrowed(path.read_text(), target)
        assert "==" in narrow
        assert ";" not in narrow
        assert hashed == ("--hash" in path.read_text())


def test_both_machines_get_their_own_numpy() -> None:
    text = (REPO / "requirements" / "pdbench.txt").read_text()
    versions = {
        minor: {line.split()[0] for line in wheelhouse.narrowed(text, Target(f"{minor}.1", "aarch64", "2.36"))[0].splitlines()}
        for minor in ("3.11", "3.12")
    }
    assert {name for name in versions["3.11"] ^ versions["3.12"] if name.startswith("numpy==")} == {
        name for found in versions.values() for name in found if name.startswith("numpy==")
    }
    assert all(sum(name.startswith("numpy==") for name in found) == 1 for found in versions.values())


@pytest.mark.parametrize(
    ("file", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-cp312-cp312-manylinux2014_aarch64.manylinux_2_17_aarch64.whl", True),
        ("a-1-cp38-abi3-manylinux_2_39_aarch64.whl", True),
        ("a-1-cp312-cp312-manylinux_2_40_aarch64.whl", False),
        ("a-1-cp311-cp311-manylinux_2_17_aarch64.whl", False),
        ("a-1-cp312-cp312-manylinux_2_17_x86_64.whl", False),
        ("a-1-cp312-cp312-musllinux_1_2_aarch64.whl", False),
    ],
)
def test_platforms_are_what_the_target_takes(file: str, fits: bool) -> None:
    names = wheelhouse.platforms(ARM)
    assert names[0] == "manylinux_2_39_aarch64"
    taken = {*cpython_tags((3, 12), platforms=names), *compatible_tags((3, 12), platforms=names)}
    assert bool(parse_wheel_filename(file)[3] & taken) == fits


def test_old_names_of_platforms_are_known() -> None:
    assert {"manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64", "linux_x86_64"} <= set(
        wheelhouse.platforms(HERE)
    )
    assert "manylinux2014_x86_64" not in wheelhouse.platforms(Target("3.9.1", "x86_64", "2.12"))


def test_a_host_without_glibc_is_refused() -> None:
    with pytest.raises(UserError, match="no glibc"):
        wheelhouse.platforms(Target("3.12.1", "x86_64", ""))


def test_wheels_for_another_machine_are_fetched_and_checked(index: Path, tmp_path: Path) -> None:
    wheel(index, "native", tag="cp312-cp312-manylinux_2_17_x86_64")
    right = wheel(index, "native", tag="cp312-cp312-manylinux_2_17_aarch64")
    plain = wheel(index, "plain", requires="never-asked-for")
    lock = f"native==1.0 ; platform_machine == 'aarch64' \\\n  --hash=sha256:{right}\nplain==1.0 --hash=sha256:{plain}\n"
    assert fetch(tmp_path, ARM, lock=lock) == ["native-1.0-cp312-cp312-manylinux_2_17_aarch64.whl", "plain-1.0-py3-none-any.whl"]
    assert any(" of 2, native" in line for line in SAID)
    with pytest.raises(UserError, match=r"could not be fetched:(.|\n)*HASHES"):
        fetch(tmp_path, ARM, lock=lock.replace(plain, "0" * 64))


def test_what_is_there_is_not_fetched_again(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = f"plain==1.0 --hash=sha256:{wheel(index, 'plain')}\n"
    first = fetch(tmp_path, ARM, lock=lock)
    monkeypatch.setattr(sys, "executable", "/no/python/here")
    assert fetch(tmp_path, ARM, lock=lock) == first
    with pytest.raises(OSError, match="/no/python/here"):
        fetch(tmp_path, HERE, lock=lock)
    assert not list((tmp_path / "house").glob("tmp*")), "what did not come to be is gone"


def test_a_package_without_a_wheel_is_named(index: Path, tmp_path: Path) -> None:
    digest = wheel(index, "native", tag="cp312-cp312-manylinux_2_17_x86_64")
    with pytest.raises(UserError) as refused:
        fetch(tmp_path, ARM, lock=f"native==1.0 --hash=sha256:{digest}\n")
    assert str(refused.value).startswith("native==1.0 (lock) has no wheel for Python 3.12 on aarch64 with glibc 2.39")


def test_files_without_hashes_need_the_hosts_own_python_or_no_dependencies(index: Path, tmp_path: Path) -> None:
    wheel(index, "torchy", requires="plain")
    wheel(index, "plain")
    with pytest.raises(UserError, match=r"open has no hashes.*run this on a controller with Python 3.12 on aarch64"):
        fetch(tmp_path, ARM, open="torchy==1.0\n")
    assert fetch(tmp_path, HERE, open="torchy==1.0\n") == ["plain-1.0-py3-none-any.whl", "torchy-1.0-py3-none-any.whl"]
    contents = {"no-deps:open": b"torchy==1.0\n"}
    tar = wheelhouse.archive(tmp_path / "house", "alone", list(contents), contents, ARM, SAID.append)
    with tarfile.open(tar) as archive:
        assert archive.getnames() == ["torchy-1.0-py3-none-any.whl"]


def test_the_name_changes_with_requirements_and_target_only() -> None:
    steps, contents = ["lock"], {"lock": b"a==1\n"}
    name = wheelhouse.identity("engine", steps, contents, ARM)
    assert name == wheelhouse.identity("engine", steps, contents, Target("3.12.9", "aarch64", "2.39"))
    others = [
        wheelhouse.identity("engine", steps, {"lock": b"a==2\n"}, ARM),
        wheelhouse.identity("engine", steps, contents, Target("3.11.1", "aarch64", "2.39")),
        wheelhouse.identity("engine", steps, contents, Target("3.12.4", "x86_64", "2.39")),
        wheelhouse.identity("engine", steps, contents, Target("3.12.4", "aarch64", "2.36")),
        wheelhouse.identity("router", steps, contents, ARM),
    ]
    assert len({name, *others}) == 6


# ---------------------------------------------------------------- on the host


def tar_of(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    return path


def test_unpacking_replaces_the_older_one_of_the_same_virtualenv(tmp_path: Path) -> None:
    house = tmp_path / "wheelhouse"
    for name in ("engine-0.1-000000000000", "engine-000000000000", "router-000000000000"):
        wheelhouse.unpack(tar_of(tmp_path / "w.tar", "a-1-py3-none-any.whl"), house / name)
    wheelhouse.unpack(tar_of(tmp_path / "w.tar", "b-1-py3-none-any.whl"), house / "engine-111111111111")
    assert sorted(str(path.relative_to(house)) for path in house.rglob("*.whl")) == [
        "engine-0.1-000000000000/a-1-py3-none-any.whl",
        "engine-111111111111/b-1-py3-none-any.whl",
        "router-000000000000/a-1-py3-none-any.whl",
    ]


@pytest.mark.parametrize("name", ["../evil.whl", "setup.py", "/etc/x.whl"])
def test_an_archive_with_anything_else_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "wheelhouse" / "engine-000000000000"
    with pytest.raises(UserError, match="which is no wheel"):
        wheelhouse.unpack(tar_of(tmp_path / "w.tar", name), folder)
    assert not folder.exists()


def test_a_host_asks_for_what_it_lacks_and_installs_from_that_alone(index: Path, tmp_path: Path) -> None:
    digest = wheel(index, "plain")
    lock = f"plain==1.0 --hash=sha256:{digest}\n".encode()
    house = wheelhouse.identity("engine", ["lock"], {"lock": lock}, HERE)
    tar = wheelhouse.archive(tmp_path / "house", "engine", ["lock"], {"lock": lock}, HERE, SAID.append)
    (index / "plain-1.0-py3-none-any.whl").unlink()
    rows, files = [{"name": "engine", "requirements": ["lock"]}], {"lock": base64.b64encode(lock).decode()}
    install, state = str(tmp_path / "install"), str(tmp_path / "state")

    def step(resumed: bool = False, archives: dict[str, str] | None = None) -> Outcome:
        return venvs.step(install, state, sys.executable, rows, files, False, resumed, {"engine": house}, archives)

    first = step()
    assert (first.done, first.lacks) == (False, [house])
    assert not (tmp_path / "install" / "engine").exists()
    outcome = step(archives={house: str(tar)})
    assert outcome.lacks == []
    assert "got wheels of engine" in outcome.changed
    for _ in range(30):
        if outcome.done:
            break
        outcome = step(resumed=True, archives={house: str(tar)})
    assert outcome.done
    assert list((tmp_path / "install" / "engine").rglob("plain.py"))
    assert step().changed == []
