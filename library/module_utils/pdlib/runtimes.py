"""Engines in containers: the command line that a plan entry becomes under docker and podman. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .errors import UserError
from .processes import work_dir

#: Runtimes whose unit runs a container, each with the client's name.
CONTAINERS = ("docker", "podman")
_NAME = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?P<name>(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?{_NAME}(?:/{_NAME})*)(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
#: Variables that the client itself would read; these go into the container by value, all others through the client's environment.
_CLIENT_READS = re.compile(r"PATH|HOME|TMPDIR|(?:LD|XDG|DOCKER|CONTAINERS?|PODMAN|BUILDAH|STORAGE|REGISTRY)_.*")

#: Variables that name folders of downloads and compiled kernels.
_CACHES = re.compile(r"HF_HOME|FLASHINFER_WORKSPACE_BASE|(?:.*_)?CACHE(?:_DIR|_ROOT|_PATH|_HOME)?")


@dataclass(frozen=True)
class Container:
    """What the container of one rank needs; paths are the host's, and the same inside.

    ``gpus``: indices (on the host) that the deployment lends there; ``files``: whether files of the user's were
    sent to ``<state_dir>/files``; ``secrets``, ``launcher``: whether it reads files of keys, and has some read by the launcher;
    ``root``: whether the client may raise limits;
    ``model``: what is mounted read-only, None for a hub's name.
    """

    runtime: str
    image: str
    unit: str
    state_dir: str
    install_dir: str
    gpus: Sequence[int]
    rdma: bool
    secrets: bool
    launcher: bool
    files: bool
    root: bool
    shm_size: Optional[str]
    model: Optional[str]
    extra: Sequence[str]


def check_image(image: Optional[str], host: str, runtime: str, archive: bool) -> str:
    """Return the reference that the container runs; raise UserError unless it says exactly which image that is.

    An image from a registry is pinned by tag (for people) and digest (for truth). One that is loaded from an archive has no
    digest of a registry's: it is known by its tag, and pinned by the archive.
    """
    right = "lmsysorg/sglang:v0.5.23@sha256:<64 hex digits>"
    if not image:
        raise UserError(f"host {host}: runtime is {runtime}, so engine_image must name the engine's image, such as {right}")
    match = _IMAGE.fullmatch(image)
    where = f"host {host}: engine_image={image!r}"
    if not match:
        raise UserError(f"{where} is not an image's name: expected one such as {right}")
    tag, digest = match["tag"], match["digest"]
    if not tag or tag == "latest":
        raise UserError(
            f"{where}: {'the tag latest moves' if tag else 'it has no tag'}; pin a release by tag and digest: {right}"
        )
    if archive:
        return f"{match['name']}:{tag}"
    if not digest:
        raise UserError(
            f"{where} has no digest, so that the tag may become another image: write {image}@sha256:<64 hex digits>; "
            f"`docker buildx imagetools inspect {image}` shows it (each architecture has its own, or take the list's)"
        )
    return image


def container_name(unit: str, state_dir: str) -> str:
    """Return the container's name: the unit's, and a mark of the state directory (two deployments may share a host)."""
    return f"{unit}-{hashlib.sha256(state_dir.encode()).hexdigest()[:8]}"


def image_record(install_dir: str, image: str) -> str:
    """Return the file that says what was loaded as ``image`` from an archive."""
    return f"{install_dir}/images/{hashlib.sha256(image.encode()).hexdigest()[:16]}.json"


def visible(gpus: Sequence[int], lent: Sequence[int]) -> Tuple[int, ...]:
    """Return a worker's GPUs as they are counted inside its container, which sees the host's ``lent`` ones from 0 on."""
    order = sorted(lent)
    return tuple(order.index(gpu) for gpu in gpus)


def _kept(env: Mapping[str, str]) -> List[str]:
    """Folders that the environment names as caches: they outlive the container."""
    found = {value.rstrip("/") for key, value in env.items() if _CACHES.fullmatch(key) and value.startswith("/")}
    found.discard("")
    # One that lies in another is there with it.
    return sorted(path for path in found if not any(path.startswith(f"{other}/") for other in found))


def _mounts(c: Container, env: Mapping[str, str]) -> List[str]:
    work = work_dir(c.state_dir, c.unit)
    pairs = [(work, work, ""), (f"{c.install_dir}/cache", "/root/.cache", ""), *((path, path, "") for path in _kept(env))]
    ours = {"secrets": c.secrets, "bin": c.launcher, "files": c.files}
    pairs += [(f"{c.state_dir}/{folder}", f"{c.state_dir}/{folder}", ",readonly") for folder, read in ours.items() if read]
    if c.model:
        pairs.append((c.model, c.model, ",readonly"))
    # Unlike --volume it refuses a folder that is not there, and does not make an empty one in its place.
    return [f"type=bind,source={source},target={target}{mode}" for source, target, mode in pairs]


def _options(c: Container, env: Mapping[str, str]) -> List[str]:
    # UCX's cuda_ipc works only in one process and IPC namespace, and where both ends see both GPUs: hence the host's own
    # namespaces, and all lent GPUs in every container (CUDA_VISIBLE_DEVICES chooses).
    options = ["--network", "host", "--pid", "host"]
    options += ["--shm-size", c.shm_size] if c.shm_size else ["--ipc", "host"]
    if c.root:
        options += ["--ulimit", "memlock=-1:-1", "--ulimit", "nofile=1048576:1048576"]
    if c.gpus and c.runtime == "docker":
        # With quotes of its own: docker reads the value as CSV.
        options += ["--gpus", '"device=' + ",".join(map(str, sorted(c.gpus))) + '"']
    elif c.gpus:
        options += [word for gpu in sorted(c.gpus) for word in ("--device", f"nvidia.com/gpu={gpu}")]
    if c.rdma:
        options += ["--device", "/dev/infiniband", "--cap-add", "IPC_LOCK"]
    # Mounts are not relabelled (a model may be shared), so SELinux must let the container read them as they are.
    options += ["--security-opt", "label=disable", "--workdir", work_dir(c.state_dir, c.unit)]
    return options + [word for mount in _mounts(c, env) for word in ("--mount", mount)]


def container(c: Container, argv: Sequence[str], env: Mapping[str, str]) -> Dict[str, Any]:
    """Return the plan's ``container`` of a rank.

    ``argv`` becomes: client, its options, the image, the engine's own command line. Values of the environment do not stand in
    it: the client has them in its own (a file that only the unit's user reads) and passes them on.
    """
    name = container_name(c.unit, c.state_dir)
    command = [
        c.runtime,
        "run",
        "--rm",
        "--name",
        name,
        "--label",
        f"pd={c.state_dir}",
        "--pull",
        "never",
        "--log-driver",
        "none",
    ]
    command += _options(c, env)
    for key, value in sorted(env.items()):
        command += ["--env", f"{key}={value}" if _CLIENT_READS.fullmatch(key) else key]
    # The image's own entrypoint is left out: some start an engine themselves.
    command += [*map(str, c.extra), "--entrypoint", argv[0], c.image, *argv[1:]]
    return {
        "runtime": c.runtime, "image": c.image, "name": name, "argv": command,
        "folders": [f"{c.install_dir}/cache", *_kept(env)], "record": image_record(c.install_dir, c.image),
    }  # fmt: skip


def client_env(env: Mapping[str, str]) -> Dict[str, str]:
    """Return the environment of the client, which it passes on by name."""
    return {key: value for key, value in env.items() if not _CLIENT_READS.fullmatch(key)}
