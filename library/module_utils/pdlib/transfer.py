"""Which builds of the transfer engines a host needs, what they need of its system, and what they are told. Pure.

Where the facts come from: the wheels' metadata and ``readelf -d`` (nixl 1.5.1, mooncake 0.3.13.post1 and 0.3.14, memfabric-hybrid
1.0.8). The builds of Mooncake are one Python module under many names, so that a virtualenv takes exactly one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

from .errors import UserError, did_you_mean, listing
from .transfer_table import KNOBS

Json = Dict[str, Any]
#: What an engine may be built for.
BUILDS = ("cuda12", "cuda13", "cpu", "npu")
#: transfer_backend -> the library that moves the bytes
LIBRARY = {"nixl": "nixl", "mooncake": "mooncake", "mooncake_tcp": "mooncake", "ascend": "memfabric"}
#: (library, build, over EFA) -> the requirement file with exactly the build that fits. NIXL's CUDA 13 wheel runs without CUDA, too.
_FILES = {
    ("nixl", "cuda12", False): "transfer-nixl-cu12",
    ("nixl", "cuda13", False): "transfer-nixl-cu13",
    ("nixl", "cpu", False): "transfer-nixl-cu13",
    ("mooncake", "cuda12", False): "transfer-mooncake-cuda12",
    ("mooncake", "cuda13", False): "transfer-mooncake-cuda13",
    ("mooncake", "cpu", False): "transfer-mooncake-cpu",
    ("mooncake", "npu", False): "transfer-mooncake-npu",
    ("mooncake", "cuda12", True): "transfer-mooncake-efa-cuda12",
    ("mooncake", "cuda13", True): "transfer-mooncake-efa-cuda13",
    ("mooncake", "cpu", True): "transfer-mooncake-efa-cpu",
    ("memfabric", "npu", False): "transfer-memfabric",
}
#: Builds for EFA and NPUs are for a newer glibc, those for EFA on x86_64 only.
_NEWER_GLIBC = (2, 35)
#: The locked build tools of NIXL's sources, and NIXL's name without a build of it.
BUILD_TOOLS, SHIM = "requirements/nixl-build.txt", "no-deps:requirements/transfer-nixl.txt"
#: NIXL's plugins that move memory between hosts.
PLUGINS = ("UCX", "LIBFABRIC", "GPUNETIO", "MOONCAKE", "UCCL")

#: Distributions that take each other's place.
_MOONCAKE = re.compile(r"mooncake-transfer-engine(?:-[a-z0-9-]+)?")
_NIXL = re.compile(r"nixl-(?:cu\d+|rocm)")


@dataclass(frozen=True)
class Host:
    """What is known of a host: ``machine`` and ``glibc`` ("" where it was not asked), whether its workers use RDMA, EFA, NPUs."""

    name: str
    machine: str = ""
    glibc: str = ""
    rdma: bool = False
    efa: bool = False
    npu: bool = False


@dataclass(frozen=True)
class Needs:
    """``steps``: requirement files for the engine's virtualenv; ``system``: rows of ``package`` and what shows that it is there.

    ``source``: how NIXL is built on the host, None for wheels. A row's ``shows``: ``lib:NAME`` (a shared library), ``file:PATH``
    (with ``*``) or ``run:PROGRAM``; one is enough.
    """

    steps: List[str] = field(default_factory=list)
    system: List[Json] = field(default_factory=list)
    source: Optional[Json] = None


def libraries(backends: Iterable[str]) -> List[str]:
    """Return the libraries of an engine's transfer backends, each once."""
    return list(dict.fromkeys(LIBRARY[name] for name in backends))


def has_efa(cards: Optional[Mapping[str, Mapping[str, Any]]]) -> bool:
    """Whether a host's RDMA devices (``rdma.by_device``) are AWS's EFA and nothing else."""
    active = [row for row in (cards or {}).values() if row["state"] == "ACTIVE"]
    return bool(active) and all(row.get("driver") == "efa" for row in active)


def _why_not(library: str, build: str, host: Host, efa: bool) -> str:
    """Say why there is no wheel of a library for a host, "" where there is one (or the host was not asked)."""
    if (library, build, efa) not in _FILES:
        return f"there is none for engine_build={build}"
    special = "for EFA" if efa else "for NPUs" if (library, build) == ("mooncake", "npu") else ""
    if efa and host.machine not in ("", "x86_64"):
        return f"the one for EFA is for x86_64, and the host is {host.machine}"
    if special and host.glibc and tuple(int(part) for part in host.glibc.split(".")[:2]) < _NEWER_GLIBC:
        return f"the one {special} needs glibc 2.35, and the host has {host.glibc}"
    return ""


def needs(
    host: Host, build: str, backends: Sequence[str], backend: str, settings: Mapping[str, Any], in_venv: bool = True
) -> Needs:
    """Return what a host with workers needs.

    ``build``: one of BUILDS, "" where its requirement files (or its image) have the transfer engine already; ``backends``: those
    that the engine knows: all that fit are installed, so that to change the backend installs nothing; ``backend``: the chosen one
    ("none": no KV cache moves); ``in_venv``: whether the engine's virtualenv is ours. Raises UserError where the chosen one has
    no wheel for the host, or sources cannot be built.
    """
    chosen, source = LIBRARY.get(backend, ""), _source(host.name, build, settings, in_venv)
    if in_venv and host.npu and build not in ("", "npu"):
        raise UserError(
            f"host {host.name}: its workers use NPUs, and the engine's virtualenv is built for {build}: set runtime: existing and an "
            "engine_python that has SGLang for Ascend, or engine_requirements of your own and engine_build: npu"
        )
    steps: List[str] = []
    for library in libraries(backends) if build and in_venv else []:
        efa = host.efa and library == "mooncake"
        why = _why_not(library, build, host, efa)
        if why and library == chosen:
            raise UserError(
                f"host {host.name}: transfer_backend is {backend}, and of {library}'s wheels {why}: set another transfer_backend, or "
                "runtime: existing with an engine_python that has it"
            )
        if not why:
            steps.append(SHIM if source and library == "nixl" else f"no-deps:requirements/{_FILES[library, build, efa]}.txt")
    return Needs(steps, system(chosen, build, host, bool(source), settings.get("nixl_backend") or "UCX"), source)


def _source(host: str, build: str, settings: Mapping[str, Any], in_venv: bool) -> Optional[Json]:
    """How NIXL is built from source on a host, None where it is not."""
    folder, prefix = settings.get("nixl_source"), settings.get("ucx_prefix")
    if not folder:
        return None
    for name, value in (("nixl_source", folder), ("ucx_prefix", prefix)):
        if not value or not re.fullmatch(r"/[^\s:'\"]+", str(value)):
            raise UserError(
                f"host {host}: {name}={value!r}: NIXL is built from source with nixl_source and ucx_prefix, both absolute paths "
                "of folders on the host (no spaces): NIXL's sources, and what UCX was installed to"
            )
    if not in_venv or build not in ("cuda12", "cuda13", "cpu"):
        what = (
            "runtime is not venv" if not in_venv else f"engine_build is {build or 'auto, and engine_requirements are your own'}"
        )
        raise UserError(
            f"host {host}: nixl_source builds NIXL into the engine's virtualenv, and {what}: leave it out, or set "
            "runtime: venv and engine_build (cuda12, cuda13 or cpu)"
        )
    name = "nixl-cu12" if build == "cuda12" else "nixl-cu13"
    return {"path": str(folder).rstrip("/"), "ucx": str(prefix).rstrip("/"), "name": name, "tools": "nixl-build"}


def _row(package: str, rpm: str, *shows: str) -> Json:
    return {"package": package, "rpm": rpm, "shows": list(shows)}


def system(library: str, build: str, host: Host, source: bool, plugin: str) -> List[Json]:
    """Return what a host's system must have for the chosen library, by the names of Debian (``package``) and Red Hat (``rpm``)."""
    rows: List[Json] = []
    mlx5 = _row("ibverbs-providers", "libibverbs", "lib:libmlx5.so.1")
    if library == "mooncake":
        rows += [
            _row("libibverbs1", "libibverbs", "lib:libibverbs.so.1"),
            _row("libnuma1", "numactl-libs", "lib:libnuma.so.1"),
            _row("libcurl4", "libcurl", "lib:libcurl.so.4"),
        ]
        # Linked by the builds for CUDA whatever the network is.
        rows += [mlx5] if build in ("cuda12", "cuda13") or host.rdma else []
        rows += (
            [_row("libfabric1", "libfabric", "lib:libfabric.so.1", "file:/opt/amazon/efa/lib*/libfabric.so.1")]
            if host.efa
            else []
        )
    if library == "nixl" and plugin == "LIBFABRIC":
        rows += [
            _row("libfabric1", "libfabric", "lib:libfabric.so.1", "file:/opt/amazon/efa/lib*/libfabric.so.1"),
            _row("libhwloc15", "hwloc-libs", "lib:libhwloc.so.15"),
        ]
    if library in ("nixl", "mooncake") and host.rdma:
        rows += [
            *([] if library == "mooncake" else [mlx5]),
            _row("librdmacm1", "librdmacm", "lib:librdmacm.so.1"),
            _row("rdma-core", "rdma-core", "file:/usr/lib/udev/rdma_rename", "file:/lib/udev/rdma_rename"),
        ]
    if source:
        rows += [
            _row("g++", "gcc-c++", "run:g++"),
            _row("pkg-config", "pkgconf-pkg-config", "run:pkg-config"),
            _row("cmake", "cmake", "run:cmake"),
        ]
    return rows


# -- two builds in one place


def _named(text: str) -> List[str]:
    """The distributions that a requirement file names, as PEP 503 writes them."""
    found = (re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line) for line in text.splitlines())
    return [re.sub(r"[-_.]+", "-", match[1]).lower() for match in found if match]


def doubled(names: Iterable[str]) -> Dict[str, List[str]]:
    """Return library -> the builds of it that are there together, where these are several; ``names``: distributions."""
    normal = sorted({re.sub(r"[-_.]+", "-", name).lower() for name in names})
    found = {
        library: [name for name in normal if pattern.fullmatch(name)]
        for library, pattern in (("mooncake", _MOONCAKE), ("nixl", _NIXL))
    }
    return {library: builds for library, builds in found.items() if len(builds) > 1}


def check_files(host: str, files: Mapping[str, str]) -> None:
    """Refuse requirement files of one virtualenv that would bring two builds of one transfer engine; ``files``: step -> text.

    The ``nixl`` of 1.x asks for both of its builds: alone with its dependencies it counts as these.
    """
    names: Dict[str, str] = {}
    for step, text in files.items():
        for name in _named(text):
            names.setdefault(name, step)
            if name == "nixl" and not step.startswith("no-deps:"):
                names.update({build: f"nixl in {step}" for build in ("nixl-cu12", "nixl-cu13")})
    for library, builds in doubled(names).items():
        where = listing(f"{build} ({names[build].replace('no-deps:', '')})" for build in builds)
        raise UserError(
            f"host {host}: the engine's virtualenv would get {len(builds)} builds of {library}: {where}. It takes one: write nixl "
            "with no-deps: beside one of its builds, and one mooncake-transfer-engine; engine_build adds those that fit"
        )


def doubled_message(python: str, found: Mapping[str, Sequence[str]]) -> str:
    """Say what is wrong with an environment that has several builds of one transfer engine, and what puts it right."""
    each = [
        f"{python} has {len(builds)} builds of {library} ({listing(builds)}): {python} -m pip uninstall {' '.join(builds)}, and "
        "install the one that fits again"
        for library, builds in found.items()
    ]
    return "; ".join(each)


# -- what the engines are told


def environment(settings: Mapping[str, Any], engine: str, role: str, backend: str) -> Dict[str, str]:
    """Return the environment that the variables of :data:`KNOBS` mean for a worker; ``backend``: "" where it is not chosen yet."""
    found: Dict[str, str] = {}
    for knob in KNOBS:
        value = settings.get(knob.name)
        if value is None or role not in knob.roles or engine not in knob.engines:
            continue
        if knob.backends and backend not in knob.backends:
            continue
        if knob.present:
            found.update({knob.env: "1"} if value else {})
        elif knob.type == "dict":
            found[knob.env] = json.dumps({key: str(item) for key, item in value.items()}, sort_keys=True)
        else:
            found[knob.env] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def check(host: str, engine: str, settings: Mapping[str, Any]) -> None:
    """Refuse values that the engine would refuse, or not read, at its start."""
    for knob in KNOBS:
        value = settings.get(knob.name)
        if value is None:
            continue
        if engine not in knob.engines:
            raise UserError(f"host {host}: {knob.name} is read by {knob.engines[0]}, and engine is {engine}: leave it out")
        for name in ("engine_env", *(f"{role}_engine_env" for role in knob.roles)):
            own = (settings.get(name) or {}).get(knob.env)
            if own is not None:
                raise UserError(f"host {host}: {knob.name}={value} and {knob.env} in {name} say the same thing: keep one of them")
    plugin, threads = settings.get("nixl_backend"), settings.get("disaggregation_thread_pool_size")
    if plugin is not None and plugin not in PLUGINS and settings.get("nixl_plugin_dir") is None:
        raise UserError(
            f"host {host}: nixl_backend={plugin!r}: one of {', '.join(PLUGINS)}, or with nixl_plugin_dir any that lies there"
            f"{did_you_mean(plugin, PLUGINS)}"
        )
    # The engine's own number of threads is 4 at least, of queues 4.
    queues = settings.get("disaggregation_queue_size") or 4
    if threads is not None and threads < queues:
        raise UserError(
            f"host {host}: disaggregation_thread_pool_size={threads} is less than disaggregation_queue_size={queues}: "
            "SGLang starts with a thread for every queue at least"
        )


def npu_environment(env: Mapping[str, str], host: str, worker: str, npus: Sequence[int]) -> Dict[str, str]:
    """Return what Mooncake on Ascend must be told of a worker's NPUs: it names them as the host counts them.

    One variable holds for all ranks of a worker; SGLang takes a rank's own number where it is not set. Raises UserError for a
    worker of several NPUs that are not the host's first.
    """
    if env.get("ENABLE_ASCEND_TRANSFER_WITH_MOONCAKE", "").lower() not in ("1", "true", "yes", "y"):
        return {}
    if len(npus) == 1:
        return {"ASCEND_NPU_PHY_ID": str(npus[0])}
    if list(npus) != list(range(len(npus))):
        raise UserError(
            f"host {host}: {worker} has NPUs {listing(map(str, npus))}, and Mooncake on Ascend takes one NPU a worker, or the "
            "first ones of its host: place it elsewhere, or use transfer_backend: ascend"
        )
    return {}
