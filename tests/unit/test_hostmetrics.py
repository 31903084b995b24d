"""What a host says of itself, from trees made for the test and from a stand-in for nvidia-smi."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from pdbench.hostmetrics import Gpus, gpu_samples, host_samples


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_cpu_memory_and_ports_are_read_with_their_units(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    write(tmp_path / "proc/stat", f"cpu  {5 * ticks} 0 {2 * ticks} {90 * ticks} 0 0 0 {ticks} 0 0\ncpu0 1 2 3\n")
    write(tmp_path / "proc/meminfo", "MemTotal:       1000 kB\nMemAvailable:    400 kB\nHugePages_Total:       0\n")
    counters = tmp_path / "sys/class/infiniband/mlx5_0/ports/1/counters"
    write(counters / "port_rcv_data", "1000\n")
    write(counters / "port_xmit_data", "250\n")
    write(counters / "port_xmit_wait", "7\n")
    write(counters / "symbol_error", "N/A (no PMA)\n")
    found = {(name, labels): value for name, labels, value in host_samples(tmp_path)}
    assert found["node_cpu_seconds_total", 'mode="user"'] == 5
    assert found["node_cpu_seconds_total", 'mode="steal"'] == 1
    assert found["node_memory_MemAvailable_bytes", ""] == 400 * 1024
    port = 'device="mlx5_0",port="1"'
    # the counters count words of 4 bytes
    assert found["node_infiniband_port_data_received_bytes_total", port] == 4000
    assert found["node_infiniband_port_data_transmitted_bytes_total", port] == 1000
    assert found["node_infiniband_port_transmit_wait_total", port] == 7
    assert ("node_infiniband_symbol_error_total", port) not in found


def test_a_host_that_says_nothing_has_no_samples(tmp_path: Path) -> None:
    assert host_samples(tmp_path) == []
    write(tmp_path / "proc/stat", "")
    write(tmp_path / "proc/meminfo", "MemTotal: what\n")
    assert host_samples(tmp_path) == []


def test_a_line_of_nvidia_smi() -> None:
    found = {(name, labels): value for name, labels, value in gpu_samples("3, 97, 41, 71234, 512.25, 1980, [N/A]\n")}
    assert found == {
        ("DCGM_FI_DEV_GPU_UTIL", 'gpu="3"'): 97,
        ("DCGM_FI_DEV_MEM_COPY_UTIL", 'gpu="3"'): 41,
        ("DCGM_FI_DEV_FB_USED", 'gpu="3"'): 71234,
        ("DCGM_FI_DEV_POWER_USAGE", 'gpu="3"'): 512.25,
        ("DCGM_FI_DEV_SM_CLOCK", 'gpu="3"'): 1980,
    }
    assert gpu_samples("No devices were found\n") == []


async def test_gpus_are_read_by_one_process_that_ends_with_us(tmp_path: Path) -> None:
    script = tmp_path / "smi"
    script.write_text(f'#!/bin/sh\necho $$ "$@" > {tmp_path}/asked\necho "0, 10, 0, 5, 70.5, 345, 30"\nexec sleep 60\n')
    script.chmod(0o755)
    gpus = Gpus()
    await gpus.start(0.5, str(script))
    try:
        for _ in range(200):
            if found := gpus.take():
                break
            await asyncio.sleep(0.02)
    finally:
        await gpus.stop()
    assert ("DCGM_FI_DEV_POWER_USAGE", 'gpu="0"', 70.5) in found
    assert gpus.take() == []
    pid, *asked = (tmp_path / "asked").read_text().split()
    assert "--loop-ms=500" in asked
    assert not Path(f"/proc/{pid}").exists()


async def test_without_the_command_nothing_happens() -> None:
    gpus = Gpus()
    await gpus.start(1.0, "no-such-command-here")
    assert gpus.take() == []
    await gpus.stop()
