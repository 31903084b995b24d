"""Facts of a host, from fabricated sources."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdlib import doctor_look, facts
from pdlib.errors import UserError


def test_gpus_are_parsed() -> None:
    text = "0, NVIDIA H200, 143771, 00000000:1B:00.0\n1, NVIDIA GH200 480GB, 97871\n\n"
    assert facts.parse_gpus(text) == [
        {"index": 0, "name": "NVIDIA H200", "memory_mib": 143771, "pci": "0000:1b:00.0"},
        {"index": 1, "name": "NVIDIA GH200 480GB", "memory_mib": 97871, "pci": ""},
    ]
    assert facts.parse_gpus("") == []


def test_a_gpu_that_does_not_tell_its_memory_is_still_one() -> None:
    (card,) = facts.parse_gpus("0, NVIDIA GB10, [N/A], 0000000F:01:00.0\n")
    assert (card["index"], card["memory_mib"], card["pci"]) == (0, 0, "000f:01:00.0")


def tool(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + text)
    (folder / name).chmod(0o755)


def test_gather_asks_the_hosts_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "nvidia-smi", "echo '0, NVIDIA A100, 81920'; echo '3, NVIDIA A100, 81920'\n")
    rows = (
        "1: lo    inet 127.0.0.1/8 scope host lo\\n2: eth0    inet6 2001:db8::1/64 scope global\\n3: br0@if7    inet 127.0.0.1/8"
    )
    tool(tmp_path, "ip", f"printf '{rows}\\n'\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = facts.gather(True)
    assert found["gpus"] == [0, 3]
    assert found["gpu_cards"][1]["memory_mib"] == 81920
    assert found["addresses"] == ["127.0.0.1", "2001:db8::1"]
    assert found["netdevs"] == {"127.0.0.1": "lo", "2001:db8::1": "eth0"}
    assert found["service_manager"] in ("systemd", "supervisord")
    assert isinstance(found["rdma"], dict)
    assert set(found["peermem"]) == {"module", "dmabuf", "kernel", "driver"}
    assert set(facts.gather(False)) <= {
        *("service_manager", "python", "addresses", "netdevs", "default_address", "port_range", "nft", "firewall"),
    }
    assert set(facts.gather(False)).isdisjoint({"gpus", "gpu_cards", "rdma", "peermem"})


def test_a_host_without_tools_or_gpus_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.gather(True)["gpus"] == []
    assert "addresses" not in facts.gather(True)
    tool(tmp_path, "nvidia-smi", "echo 'No devices were found'; exit 6\n")
    assert facts.gpus() == []
    assert "gpu_fault" not in facts.gather(True)


def test_a_broken_driver_is_told_of_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    said = "Failed to initialize NVML: Driver/library version mismatch"
    tool(tmp_path, "nvidia-smi", f"echo '{said}'; exit 18\n")
    with pytest.raises(UserError, match=rf"^nvidia-smi fails \(exit 18: {said}\): the driver needs repair"):
        facts.gpus()
    # doctor.yml goes on, and tells of it beside all else
    found = facts.gather(True)
    assert (found["gpus"], said in found["gpu_fault"]) == ([], True)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running")
def test_a_driver_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    tool(tmp_path, "nvidia-smi", "exec sleep 20\n")
    hung: list[subprocess.Popen[str]] = []
    # as for one that sleeps in the kernel, where no signal reaches it
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: hung.append(process))
    began = time.monotonic()
    try:
        assert doctor_look.run(["nvidia-smi"], 0.2) == (124, "", "nvidia-smi gave no answer within 0.2 s")
        assert time.monotonic() - began < 10
    finally:
        for process in hung:
            process.terminate()
            process.wait()
    monkeypatch.setattr(doctor_look, "run", lambda argv, limit_s: (124, "", "nvidia-smi gave no answer within 60 s"))
    with pytest.raises(UserError, match="gave no answer within 60 s"):
        facts.gpus()


def test_another_python_says_the_same_of_itself_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    own = facts.python("")
    assert own["path"] == sys.executable
    assert own["version"] == platform.python_version()
    assert facts.python(sys.executable) == own
    with pytest.raises(UserError, match="venv_python=/no/such/python: there is no such Python on the host"):
        facts.python("/no/such/python")
    (tmp_path / "python").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(UserError, match="there is no such Python"):
        facts.python(str(tmp_path / "python"))


def test_newer_pythons_beside_an_old_one_are_named_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("python3", "python3.8", "python3.11", "python3.12", "python3.14"):
        tool(tmp_path, name, "exit 0\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.newer_pythons() == [str(tmp_path / "python3.12"), str(tmp_path / "python3.11")]
    assert facts.gather(False)["python"]["others"] == facts.newer_pythons()


def test_stamps_of_virtualenvs_are_found(tmp_path: Path) -> None:
    assert facts.installed(str(tmp_path / "nothing")) == {}
    for name in ("engine", "half"):
        (tmp_path / name).mkdir()
    (tmp_path / "engine" / ".pd-stamp").write_text("abc")
    assert facts.installed(str(tmp_path)) == {"engine": "abc"}
