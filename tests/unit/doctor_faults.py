"""A healthy cluster as doctor.yml sees it, and what can go wrong with it, check by check (docs/doctor.md is made from these)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from unit import plans

from pdlib.doctor_facts import Seen

Json = dict[str, Any]
#: A cluster that can be spoilt: the arguments of Seen.
Facts = dict[str, Any]
GIB = 2**30


def _plan(fabric: str) -> Json:
    """1p1d of SGLang on two hosts with four GPUs each and one RDMA fabric, over Mooncake."""
    own = {"rdma_fabric": fabric, "rdma_devices": ["mlx5_0"], "mem_fraction": 0.8, "gpus": 4}
    return plans.plan(
        {name: {"address": f"127.0.0.{i}", **own} for i, name in ((1, "n1"), (2, "n2"))},
        "1p1d",
        engine="sglang",
        model="org/model",
        prefill=["n1"],
        decode=["n2"],
        service_manager="systemd",
    )


def port(device: str, fabric: str, **other: Any) -> Json:
    """A row of pdlib.rdma.ports: up, on NUMA node 0."""
    layer = "InfiniBand" if fabric == "infiniband" else "Ethernet"
    row = {
        "device": device, "port": 1, "state": "ACTIVE", "link_layer": layer, "fabric": fabric, "rate": "400 Gb/sec (4X NDR)",
        "netdev": "ens1" if fabric == "roce" else "ib0", "mtu": 9000, "numa": 0, "gids": [
            {"index": 0, "type": "IB/RoCE v1", "gid": "fe80::1", "address": "fe80::1", "netdev": ""},
            {"index": 3, "type": "RoCE v2", "gid": "::ffff:7f00:1", "address": "127.0.0.1", "netdev": ""},
        ],
    }  # fmt: skip
    return {**row, **other}


def _unit(name: str) -> Json:
    return {
        "name": name, "state": "running", "detail": "running, result success", "pid": 100, "restarts": 0, "oom": "", "last": "",
        "log": {}, "memlock": -1, "nofile": 1048576,
    }  # fmt: skip


def _host(name: str, units: list[str], fabric: str) -> Json:
    card = {"name": "NVIDIA H200", "memory_mib": 143771, "free_mib": 143000, "bus_id": "", "numa": 0}
    return {
        "hostname": name,
        "names": {name: "127.0.1.1"},
        "limits": {"memlock": 65536, "nofile": 65535},
        "memory": {"total": 512 * GIB, "hugepages_free": 0, "hugepage_bytes": 2 * 2**20},
        "shm": {"path": "/dev/shm", "free": 200 * GIB, "total": 200 * GIB},
        "disks": {"state_dir": {"path": "/var/lib/pd", "free": 500 * GIB, "total": 1000 * GIB}},
        "units": [_unit(unit) for unit in units],
        "listeners": [],
        "wildcards": [],
        "port_range": [32768, 60999],
        "taken": [],
        "packages": {"sglang-0.5.23": {"sglang": "0.5.23", "nixl": "1.5.1", "mooncake-transfer-engine-cuda13": "0.3.14"}},
        "containers": {},
        "gpus": [{**card, "index": i} for i in range(4)],
        "gpu_processes": [],
        "driver": {"version": "580.65.06", "error": ""},
        "peermem": {"module": "nvidia_peermem", "dmabuf": False, "kernel": "6.8.0", "driver": "580.65.06"},
        "rdma": [port("mlx5_0", fabric)],
    }


def _said(role: str, bootstrap: int | None) -> Json:
    info: Json = {
        "version": "0.5.23", "page_size": 1, "kv_cache_dtype": "auto", "disaggregation_mode": role,
        "disaggregation_transfer_backend": "mooncake",
    }  # fmt: skip
    if bootstrap:
        info["disaggregation_bootstrap_port"] = bootstrap
    failures = {"sglang:num_transfer_failed_reqs_total": 0.0}
    return {"health": 200, "error": "", "info": info, "failures": failures, "bootstrap_error": ""}


def healthy(fabric: str = "infiniband") -> Facts:
    """Two hosts on one fabric, deployed and well; nothing but ok is found."""
    plan = _plan(fabric)
    urls = {worker["name"]: worker["url"] for worker in plan["workers"]}
    way = {"from": "n2", "to": "n1", "address": "127.0.0.1", "port": 8998, "what": "bootstrap of prefill-0", "direct": True}
    nowhere = {**way, "port": 29000, "what": "the router's metrics", "stranger": True, "state": "dropped", "why": "no answer"}
    return {
        "plan": plan,
        "deployed": True,
        "refused": "",
        "leaving": {},
        "hosts": {"n1": _host("n1", ["pd-prefill-0", "pd-router"], fabric), "n2": _host("n2", ["pd-decode-0"], fabric)},
        "unreachable": {},
        "settings": {n: {"runtime": "venv", "mem_fraction": 0.8, "service_manager": "systemd"} for n in ("n1", "n2")},
        "accelerated": {"n1": True, "n2": True},
        "reach": {"n1": [], "n2": [{**way, "state": "open", "why": ""}, nowhere]},
        "front": {
            "from": "n1",
            "busy": {},
            "router": {
                "ready": 200,
                "error": "",
                "workers": [
                    {"url": urls["prefill-0"], "worker_type": "prefill", "is_healthy": True, "bootstrap_port": 8998},
                    {"url": urls["decode-0"], "worker_type": "decode", "is_healthy": True, "bootstrap_port": None},
                ],
            },
            "workers": {"prefill-0": _said("prefill", 8998), "decode-0": _said("decode", None)},
            "pairs": [{"prefill": "prefill-0", "decode": "decode-0", "seconds": 0.08, "error": ""}],
            "stream": {"error": "", "tokens_s": [0.05 + 0.004 * i for i in range(24)], "empty_first_s": None, "end_s": 0.15},
        },
        "wheel_cuda": {"n1": "13.0.96", "n2": "13.0.96"},
        "clocks": {"n1": (0.1, 0.6), "n2": (-0.2, 0.7)},
        "probe": {},
    }


def made(facts: Facts) -> Seen:
    """The facts as checks take them, in no way connected with the original."""
    return Seen(**copy.deepcopy(facts))


Spoil = Callable[[Facts], object]
#: (checks that find something and no others, severity of the first, where, fabric of the cluster, how it is spoilt).
SPOILT: list[tuple[tuple[str, ...], str, str, str, Spoil]] = []


def fault(*ids: str, severity: str = "error", where: str = "n1", fabric: str = "infiniband") -> Callable[[Spoil], Spoil]:
    """Register a fault: its docstring says what happened."""

    def add(spoil: Spoil) -> Spoil:
        SPOILT.append((ids, severity, where, fabric, spoil))
        return spoil

    return add


def _worker(f: Facts, name: str) -> Json:
    said: Json = f["front"]["workers"][name]
    return said


def _rank(f: Facts, name: str) -> Json:
    rank: Json = next(w for w in f["plan"]["workers"] if w["name"] == name)["ranks"][0]
    return rank


# -- hosts


@fault("host", where="n3")
def _dark(f: Facts) -> None:
    """A host does not answer."""
    f["unreachable"]["n3"] = "cannot be reached: Connection timed out"


@fault("inventory", where="inventory")
def _too_few(f: Facts) -> None:
    """The ratio does not fit the GPUs that were found."""
    f["refused"] = "ratio 9p1d does not fit."


@fault("inventory", severity="info", where="inventory")
def _edited(f: Facts) -> None:
    """The inventory was edited after the deploy."""
    f["leaving"] = {"decode-0": "http://127.0.0.2:30000"}


@fault("gpu")
def _no_gpu(f: Facts) -> None:
    """The driver does not find a GPU."""
    f["hosts"]["n1"].update(gpus=[], driver={"version": "", "error": "NVIDIA-SMI has failed"})


@fault("gpu")
def _one_gpu_fell_off(f: Facts) -> None:
    """A GPU fell off the bus."""
    del f["hosts"]["n1"]["gpus"][0]


@fault("driver")
def _old_driver(f: Facts) -> None:
    """The driver is of CUDA 12's time, the wheels bring CUDA 13."""
    f["hosts"]["n1"]["driver"]["version"] = "550.163.01"


@fault("driver", where="n2")
def _old_driver_for_what_is_installed(f: Facts) -> None:
    """The driver runs what the lock file names, and not what is installed."""
    f["wheel_cuda"]["n2"] = "12.9.37"
    f["hosts"]["n2"]["driver"]["version"] = "560.35.03"
    f["hosts"]["n2"]["packages"]["sglang-0.5.23"]["nvidia-cuda-runtime"] = "13.0.96"


@fault("gpu-memory", where="n1 GPU 0")
def _memory_gone(f: Facts) -> None:
    """Less memory is free than mem_fraction takes, before a deploy (the container that fails to start)."""
    f["deployed"], f["front"] = False, {}
    for facts in f["hosts"].values():
        facts["units"] = []
    f["hosts"]["n1"]["gpus"][0]["free_mib"] = 60000


@fault("gpu-process", severity="warning", where="n1 GPU 0")
def _leftover(f: Facts) -> None:
    """A process of an earlier try still holds memory of a GPU."""
    row = {"gpu": 0, "pid": 4711, "used_mib": 900, "command": "python -m sglang.launch_server", "ours": False}
    f["hosts"]["n1"]["gpu_processes"].append(row)


@fault("container-gpu")
def _no_toolkit(f: Facts) -> None:
    """docker works, and has no NVIDIA runtime."""
    f["settings"]["n1"]["runtime"] = "docker"
    f["hosts"]["n1"]["containers"] = {"docker": {"error": "", "gpu": ""}}


@fault("container-gpu", where="n2")
def _no_daemon(f: Facts) -> None:
    """The docker daemon does not run."""
    f["settings"]["n2"]["runtime"] = "docker"
    f["hosts"]["n2"]["containers"] = {"docker": {"error": "Cannot connect to the Docker daemon", "gpu": ""}}


@fault("memlock")
def _locked_memory(f: Facts) -> None:
    """A unit may lock 8 MiB of memory only."""
    f["hosts"]["n1"]["units"][0]["memlock"] = 8 * 2**20


@fault("memlock", where="n2")
def _locked_memory_of_a_shell(f: Facts) -> None:
    """supervisord would hand the shell's 64 KiB on."""
    f["settings"]["n2"]["service_manager"] = "supervisord"
    f["hosts"]["n2"]["units"] = []
    f["hosts"]["n1"]["units"] = []
    f["deployed"], f["front"] = False, {}


@fault("open-files", severity="warning", where="n2")
def _few_files(f: Facts) -> None:
    """A worker may open 1024 files."""
    f["hosts"]["n2"]["units"][0]["nofile"] = 1024


@fault("hugepages", severity="warning")
def _hugepages(f: Facts) -> None:
    """Half of the memory lies in huge pages that nobody uses."""
    f["hosts"]["n1"]["memory"]["hugepages_free"] = 131072


@fault("shm", severity="warning", where="n2")
def _small_shm(f: Facts) -> None:
    """/dev/shm has docker's 64 MiB."""
    f["hosts"]["n2"]["shm"]["total"] = 64 * 2**20


@fault("disk")
def _full_disk(f: Facts) -> None:
    """The disk of the state directory is full."""
    f["hosts"]["n1"]["disks"]["state_dir"]["free"] = 10 * 2**20


@fault("disk", severity="warning", where="n2")
def _little_room(f: Facts) -> None:
    """There is no room for another model."""
    f["hosts"]["n2"]["disks"]["model_dir"] = {"path": "/var/lib/pd-models", "free": 3 * GIB, "total": 1000 * GIB}


@fault("names")
def _no_name(f: Facts) -> None:
    """A host does not know the name of another."""
    f["hosts"]["n1"]["names"]["n2.cluster"] = ""


@fault("names", severity="warning", where="n2")
def _not_its_own_name(f: Facts) -> None:
    """A host does not know its own name."""
    f["hosts"]["n2"]["names"]["n2"] = ""


@fault("clock", severity="warning", where="n2")
def _skew(f: Facts) -> None:
    """A clock is an hour ahead."""
    f["clocks"]["n2"] = (3600.0, 0.7)


@fault("versions", where="n1 and n2")
def _other_nixl(f: Facts) -> None:
    """One host has another NIXL."""
    f["hosts"]["n2"]["packages"]["sglang-0.5.23"]["nixl"] = "1.4.0"


@fault("versions", where="n2")
def _no_transfer_engine(f: Facts) -> None:
    """One host's engine has no Mooncake beside it."""
    del f["hosts"]["n2"]["packages"]["sglang-0.5.23"]["mooncake-transfer-engine-cuda13"]


# -- between hosts


@fault("hca")
def _port_down(f: Facts) -> None:
    """The port of the planned HCA is down."""
    f["hosts"]["n1"]["rdma"][0]["state"] = "DOWN"


@fault("hca", where="n2")
def _no_hca(f: Facts) -> None:
    """The planned HCA is not there, another one is."""
    f["hosts"]["n2"]["rdma"][0]["device"] = "mlx5_7"


@fault("link-layer")
def _roce_instead(f: Facts) -> None:
    """A card that should be InfiniBand is Ethernet."""
    f["hosts"]["n1"]["rdma"] = [port("mlx5_0", "roce")]


@fault("fabric", where="prefill-0 -> decode-0")
def _two_fabrics(f: Facts) -> None:
    """Mooncake between InfiniBand and RoCE."""
    f["hosts"]["n2"]["rdma"] = [port("mlx5_0", "roce")]
    f["plan"]["hosts"]["n2"]["rdma_fabric"] = "roce"


@fault("silent-tcp", severity="warning", where="prefill-0 -> decode-0")
def _tcp_beside_rdma(f: Facts) -> None:
    """The plan takes TCP between hosts that both have InfiniBand."""
    f["plan"]["transfer_backend"] = "nixl"
    f["plan"]["pairs"][0]["expected_transport"] = "tcp"
    for name in ("n1", "n2"):
        f["plan"]["hosts"][name].update(rdma_fabric="none", rdma_devices=[])
    for said in f["front"]["workers"].values():
        said["info"]["disaggregation_transfer_backend"] = "nixl"


@fault("gid", fabric="roce")
def _only_v1(f: Facts) -> None:
    """A RoCE card has no RoCE v2 GID: its network device has no address."""
    del f["hosts"]["n1"]["rdma"][0]["gids"][1]


@fault("peermem")
def _no_peermem(f: Facts) -> None:
    """nvidia_peermem is not loaded, and the driver is not the open one."""
    f["hosts"]["n1"]["peermem"]["module"] = ""


@fault("mtu", where="RoCE netdevs", fabric="roce")
def _mtu(f: Facts) -> None:
    """One end of the RoCE network has an MTU of 1500, the other 9000."""
    f["hosts"]["n2"]["rdma"][0]["mtu"] = 1500


@fault("mtu", severity="info", where="RoCE netdevs", fabric="roce")
def _small_mtu(f: Facts) -> None:
    """Both ends of the RoCE network have an MTU of 1500, too small for RDMA frames of 4096."""
    for name in ("n1", "n2"):
        f["hosts"][name]["rdma"][0]["mtu"] = 1500


@fault("numa", severity="warning", where="n1 prefill-0")
def _far_nic(f: Facts) -> None:
    """The planned HCA is on the other socket."""
    f["hosts"]["n1"]["rdma"] = [port("mlx5_0", "infiniband", numa=1), port("mlx5_3", "infiniband")]


@fault("ports", where="n2 -> n1")
def _dropped(f: Facts) -> None:
    """A firewall drops what decode sends to the bootstrap port."""
    f["reach"]["n2"][0].update(state="dropped", why="no answer within 3 s")


@fault("ports", where="n2 -> n1")
def _rejected(f: Facts) -> None:
    """A firewall rejects it."""
    f["reach"]["n2"][0].update(state="unreachable", why="No route to host")


@fault("ports", where="n2 -> n1")
def _refused(f: Facts) -> None:
    """A worker listens at another address."""
    f["reach"]["n2"][0].update(state="refused", why="refused")


@fault("ports", severity="info", where="n2 -> n1")
def _untried(f: Facts) -> None:
    """A way that could not be tried is said, and is no error."""
    f["reach"]["n2"][0].update(state="unheard", why="n1 cannot listen there")


@fault("exposure", severity="info")
def _open_to_all(f: Facts) -> None:
    """A port answers a host that has no business there, and there is no firewall."""
    f["reach"]["n2"][1].update(state="open", why="")


@fault("exposure")
def _firewall_gone(f: Facts) -> None:
    """A port answers a host that the firewall should keep out."""
    f["plan"]["hosts"]["n1"]["firewall"] = {"spared": [], "range": [32768, 60999]}
    f["reach"]["n2"][1].update(state="open", why="")


@fault("exposure")
def _firewall_flushed(f: Facts) -> None:
    """The rules are gone, and no examined host is a stranger who could notice."""
    f["plan"]["hosts"]["n1"]["firewall"] = {"spared": [], "range": [32768, 60999]}
    f["hosts"]["n1"]["walled"] = False


@fault("wildcard")
def _listens_everywhere(f: Facts) -> None:
    """A worker listens on all addresses at the port of its API."""
    f["hosts"]["n1"]["wildcards"] = [{"unit": "pd-prefill-0", "port": 30000}]


@fault("wildcard", severity="info")
def _listens_as_told(f: Facts) -> None:
    """A worker listens on all addresses because listen_address says so."""
    f["plan"]["workers"][0]["ranks"][0]["listen"] = "0.0.0.0"
    f["hosts"]["n1"]["wildcards"] = [{"unit": "pd-prefill-0", "port": 30000}]


@fault("wildcard", severity="info")
def _engine_everywhere(f: Facts) -> None:
    """A port that an engine opens by itself is open on all addresses (Mooncake's, torch's rendezvous)."""
    f["hosts"]["n1"]["wildcards"] = [{"unit": "pd-prefill-0", "port": 15873}]


@fault("port-taken")
def _taken(f: Facts) -> None:
    """Another program holds the port of a worker."""
    row = {"address": "127.0.0.1", "port": 30000, "unit": "pd-prefill-0", "holder": "process 99 (jupyter)"}
    f["hosts"]["n1"]["taken"].append(row)


# -- what is deployed


@fault("unit", where="n2")
def _dead_unit(f: Facts) -> None:
    """A unit died."""
    f["hosts"]["n2"]["units"][0].update(state="dead", detail="auto-restart, result exit-code", last="RuntimeError: boom")


@fault("unit", where="n2")
def _no_unit(f: Facts) -> None:
    """A unit of the plan is not there at all."""
    f["hosts"]["n2"]["units"].clear()


@fault("restarts", severity="warning", where="n2")
def _restarted(f: Facts) -> None:
    """A unit was started anew."""
    f["hosts"]["n2"]["units"][0]["restarts"] = 3


@fault("oom", severity="warning", where="n2")
def _cuda_oom(f: Facts) -> None:
    """A worker's log has "CUDA out of memory"."""
    f["hosts"]["n2"]["units"][0]["oom"] = "torch.OutOfMemoryError: CUDA out of memory."


@fault("unit", "oom", where="n2")
def _killed(f: Facts) -> None:
    """The kernel ended a worker for want of memory."""
    f["hosts"]["n2"]["units"][0].update(state="dead", oom="the kernel ended it for want of memory (Result=oom-kill)")


@fault("router", where="router on n1")
def _router_gone(f: Facts) -> None:
    """The router does not answer."""
    f["front"]["router"] = {"ready": 0, "error": "Connection refused", "workers": None}


@fault("router", where="router on n1")
def _router_not_ready(f: Facts) -> None:
    """The router counts too few workers."""
    f["front"]["router"].update(ready=503, error="no decode workers")


@fault("router", where="router on n1")
def _wrong_key(f: Facts) -> None:
    """The router was started with another API key."""
    f["front"]["router"] = {"ready": 401, "error": "", "workers": None}


@fault("worker-health", where="decode-0")
def _sick(f: Facts) -> None:
    """A worker does not answer."""
    _worker(f, "decode-0").update(health=0, error="timed out", info={}, failures={})


@fault("worker-health", severity="warning", where="decode-0")
def _called_sick(f: Facts) -> None:
    """The router holds a worker for unhealthy that answers."""
    f["front"]["router"]["workers"][1]["is_healthy"] = False


@fault("membership", where="router")
def _not_a_member(f: Facts) -> None:
    """The router forgot a worker."""
    del f["front"]["router"]["workers"][1]


@fault("membership", where="router")
def _stranger(f: Facts) -> None:
    """The router has a worker that nobody planned."""
    row = {"url": "http://127.0.0.9:30000", "worker_type": "decode", "is_healthy": True, "bootstrap_port": None}
    f["front"]["router"]["workers"].append(row)


@fault("bootstrap-port", where="prefill-0")
def _other_bootstrap(f: Facts) -> None:
    """The router's --prefill URL PORT names another port than the prefill worker has."""
    f["front"]["router"]["workers"][0]["bootstrap_port"] = 9001


@fault("bootstrap-port", where="prefill-0")
def _no_bootstrap(f: Facts) -> None:
    """The router's --prefill URL has no port, and the worker's is not 8998."""
    f["front"]["router"]["workers"][0]["bootstrap_port"] = None


@fault("bootstrap-port", where="prefill-0")
def _bootstrap_elsewhere(f: Facts) -> None:
    """The prefill worker was started with another bootstrap port than planned."""
    _worker(f, "prefill-0")["info"]["disaggregation_bootstrap_port"] = 9005


@fault("bootstrap-port", where="prefill-0")
def _bootstrap_silent(f: Facts) -> None:
    """Nothing listens at the bootstrap port, though the worker is healthy."""
    _worker(f, "prefill-0")["bootstrap_error"] = "Connection refused"


@fault("pair", where="prefill-0 -> decode-0")
def _pair(f: Facts) -> None:
    """A pair does not serve, though both workers are healthy."""
    f["front"]["pairs"][0]["error"] = "decode-0: HTTP 500 KVTransferError(bootstrap_room=1): Failed to get kvcache"
    f["front"]["stream"] = {}


@fault("stream", severity="warning", where="router")
def _ttft_zero(f: Facts) -> None:
    """The first event has no token, so that TTFT shows 0."""
    f["front"]["stream"]["empty_first_s"] = 0.001


@fault("stream", severity="info", where="router")
def _empty_first(f: Facts) -> None:
    """The first event has no token and comes with the first token: no harm yet."""
    f["front"]["stream"]["empty_first_s"] = 0.049


@fault("stream", severity="warning", where="router")
def _held_back(f: Facts) -> None:
    """The router collects the stream and sends it in one piece."""
    f["front"]["stream"]["tokens_s"] = [0.149 + 0.00001 * i for i in range(24)]


@fault("stream", where="router")
def _stream_fails(f: Facts) -> None:
    """A stream breaks off."""
    f["front"]["stream"]["error"] = "HTTP 503"


@fault("slow-down", where="decode-0")
def _slowed(f: Facts) -> None:
    """Somebody left /slow_down switched on."""
    _worker(f, "decode-0")["info"]["slow_down_s"] = 90.0


@fault("slow-down", severity="info", where="decode-0")
def _maybe_slowed(f: Facts) -> None:
    """The log has a call of /slow_down, of which SGLang does not say whether it still holds."""
    f["hosts"]["n2"]["units"][0]["log"]["slow_down"] = 'INFO: 127.0.0.1 - "POST /slow_down HTTP/1.1" 200 OK'


@fault("profiler", where="prefill-0")
def _profiled(f: Facts) -> None:
    """A profiler runs."""
    _worker(f, "prefill-0")["info"]["profiling"] = True


@fault("profiler", where="prefill-0")
def _profile_in_the_log(f: Facts) -> None:
    """The log has a profile that was started and not ended."""
    f["hosts"]["n1"]["units"][0]["log"]["profile"] = "Profiling starts. Traces will be saved to: /tmp"


@fault("kv-failures", severity="warning", where="prefill-0")
def _failures(f: Facts) -> None:
    """Transfers failed earlier."""
    _worker(f, "prefill-0")["failures"]["sglang:num_transfer_failed_reqs_total"] = 3.0


@fault("pair", "kv-failures", where="prefill-0 -> decode-0")
def _failures_now(f: Facts) -> None:
    """Transfers fail now."""
    _failures(f)
    _pair(f)


@fault("kv-log", severity="warning", where="decode-0")
def _failed_to_get(f: Facts) -> None:
    """The decode worker's log has "Failed to get kvcache"."""
    f["hosts"]["n2"]["units"][0]["log"]["kv"] = "KVTransferError(bootstrap_room=1): Failed to get kvcache from prefill instance"


@fault("kv-log", "pair", where="decode-0")
def _fails_to_get(f: Facts) -> None:
    """The decode worker's log has it, and a pair of it fails now."""
    _failed_to_get(f)
    _pair(f)


@fault("transport", where="prefill-0 -> decode-0")
def _fell_back(f: Facts) -> None:
    """Mooncake found no HCA and fell back to TCP, as its log says."""
    f["hosts"]["n1"]["units"][0]["log"]["tcp"] = "Using TCP transport (no HCA detected)"


@fault("transfer-backend", where="prefill-0 and decode-0")
def _two_backends(f: Facts) -> None:
    """Prefill has Mooncake, decode NIXL."""
    _worker(f, "decode-0")["info"]["disaggregation_transfer_backend"] = "nixl"


@fault("kv-layout", where="prefill-0 and decode-0")
def _page_size(f: Facts) -> None:
    """Page sizes differ."""
    _worker(f, "decode-0")["info"]["page_size"] = 64


@fault("kv-layout", where="prefill-0 and decode-0")
def _dtype(f: Facts) -> None:
    """KV data types differ."""
    _worker(f, "decode-0")["info"]["kv_cache_dtype"] = "fp8_e4m3"


@fault("running-version", where="prefill-0 and decode-0")
def _mixed(f: Facts) -> None:
    """One worker runs an older engine."""
    _worker(f, "decode-0")["info"]["version"] = "0.5.17"


@fault("busy", severity="info", where="deployment")
def _measured(f: Facts) -> None:
    """A bench.yml is at it."""
    f["front"]["busy"] = {"verb": "bench", "user": "ada", "controller": "c1", "pid": 7}
    f["front"].update(pairs=[], stream={})


@fault("kv-probe", where="prefill-0 (n1, GPU 0) -> decode-0 (n2, GPU 0)")
def _probe(f: Facts) -> None:
    """The KV path probe of the last deploy saw TCP where RDMA is planned."""
    row = {"prefill": "prefill-0 (n1, GPU 0)", "decode": "decode-0 (n2, GPU 0)", "seen": "tcp", "expected": "rdma", "gb_s": 1.2}
    row.update(ok=False, finding="tcp was seen, rdma expected", cause="no HCA", fix="rdma_devices", when="2026-01-01T10:00:00Z")
    f["probe"] = {"ok": False, "paths": [row], "known": []}
