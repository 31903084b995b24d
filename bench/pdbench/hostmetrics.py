"""What a host says of itself: CPU, memory, RDMA ports and GPUs, under the names that node_exporter and DCGM give them.

Values are read from /proc, /sys and `nvidia-smi`, where there is one; what a host lacks has no sample. Counters count from
the host's start: rates are differences of two samples. No root is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

#: (name, labels, value)
Sample = tuple[str, str, float]
_CPU_MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
_MEMORY = ("MemTotal", "MemAvailable", "MemFree", "Cached", "SwapFree")
#: file in .../ports/N/counters -> (name, unit); port_*_data counts 4-byte words (InfiniBand spec vol. 1, PortCounters)
_PORT = {
    "port_rcv_data": ("node_infiniband_port_data_received_bytes_total", 4),
    "port_xmit_data": ("node_infiniband_port_data_transmitted_bytes_total", 4),
    "port_rcv_packets": ("node_infiniband_port_packets_received_total", 1),
    "port_xmit_packets": ("node_infiniband_port_packets_transmitted_total", 1),
    "port_xmit_wait": ("node_infiniband_port_transmit_wait_total", 1),
    "port_rcv_errors": ("node_infiniband_port_errors_received_total", 1),
    "port_xmit_discards": ("node_infiniband_port_discards_transmitted_total", 1),
    "symbol_error": ("node_infiniband_symbol_error_total", 1),
    "link_downed": ("node_infiniband_link_downed_total", 1),
}
#: field of `nvidia-smi --query-gpu` -> DCGM's name: %, %, MiB, W, MHz, degrees C
_GPU = {
    "utilization.gpu": "DCGM_FI_DEV_GPU_UTIL",
    "utilization.memory": "DCGM_FI_DEV_MEM_COPY_UTIL",
    "memory.used": "DCGM_FI_DEV_FB_USED",
    "power.draw": "DCGM_FI_DEV_POWER_USAGE",
    "clocks.sm": "DCGM_FI_DEV_SM_CLOCK",
    "temperature.gpu": "DCGM_FI_DEV_GPU_TEMP",
}
_KILL_AFTER_S = 2.0


def host_samples(root: Path = Path("/")) -> list[Sample]:
    """Return CPU seconds by mode (all cores together), memory in bytes, and RDMA port counters."""
    return [*_cpu(root / "proc/stat"), *_memory(root / "proc/meminfo"), *_ports(root / "sys/class/infiniband")]


def _cpu(path: Path) -> Iterator[Sample]:
    with contextlib.suppress(OSError, ValueError):
        ticks = os.sysconf("SC_CLK_TCK")
        first = path.read_text(encoding="ascii").partition("\n")[0].split()
        for mode, value in zip(_CPU_MODES, first[1:], strict=False):
            yield "node_cpu_seconds_total", f'mode="{mode}"', int(value) / ticks


def _memory(path: Path) -> Iterator[Sample]:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name in _MEMORY:
                yield f"node_memory_{name}_bytes", "", float(rest.split()[0]) * 1024


def _ports(path: Path) -> Iterator[Sample]:
    for counters in sorted(path.glob("*/ports/*/counters")):
        labels = f'device="{counters.parts[-4]}",port="{counters.parts[-2]}"'
        for file, (name, unit) in _PORT.items():
            # Not every device has every counter, and RoCE ones refuse some ("N/A (no PMA)").
            with contextlib.suppress(OSError, ValueError):
                yield name, labels, float(int((counters / file).read_text(encoding="ascii")) * unit)


def gpu_samples(line: str) -> list[Sample]:
    """Return the samples of one line of `Gpus`; a value that the GPU does not give ("[N/A]") has none."""
    index, *values = (word.strip() for word in line.split(","))
    found = []
    for name, value in zip(_GPU.values(), values, strict=False):
        with contextlib.suppress(ValueError):
            found.append((name, f'gpu="{index}"', float(value)))
    return found


class Gpus:
    """One `nvidia-smi` that prints every GPU's line at intervals: starting one each time costs 50 ms of CPU and more."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._latest: dict[str, list[Sample]] = {}

    async def start(self, every_s: float, command: str = "nvidia-smi") -> None:
        """Begin to read, every ``every_s`` seconds; without the command nothing happens."""
        path = shutil.which(command)
        if path is None:
            return
        query = ",".join(("index", *_GPU))
        args = (f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--loop-ms={max(100, round(1000 * every_s))}")
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        with contextlib.suppress(OSError):
            self._process = await asyncio.create_subprocess_exec(path, *args, stdin=null, stdout=pipe, stderr=null)
            self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            text = line.decode("utf-8", "replace")
            if found := gpu_samples(text):
                self._latest[text.partition(",")[0]] = found

    def take(self) -> list[Sample]:
        """Return what came since the last call."""
        found = [sample for samples in self._latest.values() for sample in samples]
        self._latest.clear()
        return found

    async def stop(self) -> None:
        """End the process, and wait for it."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _KILL_AFTER_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
        self._process = self._reader = None
