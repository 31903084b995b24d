"""What a host must have beside virtualenvs of ours before its workers start: an image, an environment, a model. Pure."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, Sequence

from . import keys, models, runtimes
from .errors import UserError

Json = Dict[str, Any]
Settings = Mapping[str, Any]
#: What our locks are made for (tools/lock.sh).
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)


def engine_python(host: str, settings: Settings, venv: str) -> str:
    """Return the Python that runs the engine: ``venv``'s, the user's, or the image's."""
    named = settings["engine_python"]
    if settings["runtime"] in runtimes.CONTAINERS:
        return str(named or "python3")
    if settings["runtime"] != "existing":
        return f"{venv}/bin/python"
    if not named:
        raise UserError(f"host {host}: runtime is existing, so engine_python must name the Python that has the engine")
    # A conda or virtual environment by its folder.
    return str(named) if "python" in named.rpartition("/")[2] else f"{named.rstrip('/')}/bin/python"


def model_on(settings: Settings, cluster: Settings, model: str) -> str:
    """Return the model as the engine on a host takes it: a path where it is made available by us, else as it was given."""
    return models.location(model, cluster["model_source"], settings["model_dir"], cluster["model_revision"])


def _image(host: str, settings: Settings) -> str:
    return runtimes.check_image(settings["engine_image"], host, settings["runtime"], bool(settings["engine_image_archive"]))


def container(rank: Json, settings: Settings, cluster: Settings, model: str, lent: Sequence[int], accelerated: bool) -> Json:
    """Return the container of a rank. What the engine downloads is put into ``model_dir`` (in ``rank``'s environment).

    ``model``: "" for an engine that needs none; ``lent``: the GPUs that the deployment has on the host.
    """
    if model and not model.startswith("/"):
        rank["env"].setdefault("HF_HOME", f"{settings['model_dir']}/huggingface")
    entry = runtimes.Container(
        runtime=settings["runtime"],
        image=_image(rank["host"], settings),
        unit=rank["unit"][: -len(".service")],
        state_dir=settings["state_dir"],
        install_dir=settings["install_dir"],
        gpus=lent if accelerated and "CUDA_VISIBLE_DEVICES" in rank["env"] else (),
        rdma=accelerated and bool(rank["rdma_devices"]),
        launcher=cluster["api_key"] is not None or cluster["admin_api_key"] is not None,
        secrets=any(keys.reads(rank, name) for name in keys.FILES),
        files=bool(settings["engine_files"]),
        root=settings["service_manager"] == "systemd" or settings["runtime"] == "docker",
        shm_size=settings["engine_shm_size"],
        model=model if model.startswith("/") else None,
        extra=[str(item) for item in settings["engine_container_args"]],
    )
    return runtimes.container(entry, rank["argv"], rank["env"])


def of_host(
    host: str, settings: Settings, cluster: Settings, engine: Mapping[str, str], model: str, needs_model: bool, accelerated: bool
) -> Json:
    """Return ``runtime`` and ``model`` of a host with workers, each only where there is something to check or to fetch.

    ``engine``: its ``engine`` name, ``package``, ``version`` and ``python``.
    """
    rows: Json = {}
    kind, archive = settings["runtime"], settings["engine_image_archive"]
    if kind == "existing":
        env = {key: str(value) for key, value in settings["engine_env"].items()}
        rows["runtime"] = {"kind": kind, **engine, "env": env}
    elif kind in runtimes.CONTAINERS:
        image = _image(host, settings)
        rows["runtime"] = {
            "kind": kind, "image": image, "archive": archive or "", "gpus": accelerated,
            "record": runtimes.image_record(settings["install_dir"], image), "min_free_gb": settings["engine_image_min_free_gb"],
        }  # fmt: skip
    path, source = model_on(settings, cluster, model), cluster["model_source"]
    if path.startswith("/") and (needs_model or source != "path") and (source != "path" or cluster["model_sha256"]):
        rows["model"] = {"path": path, "name": model, "source": source, "dir": settings["model_dir"]}
    return rows


def check_model(host: str, model: str, there: Optional[bool]) -> None:
    """Refuse a model's path that the host has not; ``there`` is None where it was not looked for."""
    if there is False:
        raise UserError(
            f"host {host}: model={model} is not there, and model_source is path: put it there, or let model_source bring it "
            "(hub: from the hub; rsync: from the first host that has it)"
        )


def check_python(host: str, found: Mapping[str, Any]) -> None:
    """Refuse a Python (``found``: as pd_facts tells of it) that our locked requirements are not for."""
    minor = tuple(int(part) for part in found["version"].split(".")[:2])
    if OLDEST_PYTHON <= minor <= NEWEST_PYTHON:
        return
    others = list(found.get("others", []))
    hint = f"set venv_python={others[0]}, which is there" if others else "install one, and set venv_python to its path"
    raise UserError(
        f"host {host}: {found['path']} is Python {found['version']}, and virtualenvs need 3.{OLDEST_PYTHON[1]} to "
        f"3.{NEWEST_PYTHON[1]}: {hint} (host_vars of {host})"
    )
