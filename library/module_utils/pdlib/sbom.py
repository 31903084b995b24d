"""What a deployment is made of, as a CycloneDX 1.6 bill of materials: packages, images and the model, by host. Pure.

Virtualenvs of ours are installed from complete locks and nothing else, so the lock narrowed to a host's Python is what is
there. An environment of the user's (`runtime: existing`) and what is inside of an image are not looked into: they are named.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any, Dict, List, Mapping, Tuple
from urllib.parse import quote

from . import wheelhouse
from .runtimes import CONTAINERS

Json = Dict[str, Any]
#: the file beside manifest.json, which names it
FILE = "sbom.cdx.json"
#: (type, name, version) -> (component without its places, places: what it is installed in -> hosts)
_Found = Dict[Tuple[str, str, str], Tuple[Json, Dict[str, List[str]]]]
_ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}


def make(
    plan: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]], texts: Mapping[str, str], model_sha256: str = ""
) -> Json:
    """Return the bill of materials; the same deployment gives the same one.

    ``facts``: host -> what was found there (its ``python``, where known); ``texts``: requirement file -> its content;
    ``model_sha256``: the model's checksum where one is demanded.
    """
    found: _Found = {}
    for host, entry in plan["hosts"].items():
        python = facts.get(host, {}).get("python") or {}
        for row in entry["installs"]:
            for step in row["requirements"]:
                for component in packages(texts.get(step.split(":", 1)[-1], ""), python):
                    _put(found, component, row["name"], host)
        runtime = entry.get("runtime")
        if runtime and runtime["kind"] in CONTAINERS:
            _put(found, image(runtime["image"], python.get("machine", "")), runtime["kind"], host)
        elif runtime:
            about = {"type": "library", "name": runtime["package"], "version": runtime["version"]}
            _put(found, about, f"existing environment of {runtime['python']}", host)
    if not plan["emulated"]:
        checksum = {"hashes": [{"alg": "SHA-256", "content": model_sha256}]} if model_sha256 else {}
        for host in dict.fromkeys(rank["host"] for worker in plan["workers"] for rank in worker["ranks"]):
            _put(found, {"type": "machine-learning-model", "name": plan["model"], "version": "", **checksum}, "workers", host)
    components = [_placed(*found[key]) for key in sorted(found)]
    made: Json = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {
            "type": "platform", "name": f"{plan['engine']} {plan['ratio']}", "version": plan["engine_version"],
        }},
        "components": components,
    }  # fmt: skip
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(made, sort_keys=True))
    return {**made, "serialNumber": f"urn:uuid:{number}"}


def packages(text: str, python: Mapping[str, str]) -> List[Json]:
    """Return the components of a requirement file, of those lines that hold for the host's ``python``, where it is known."""
    if python.get("version") and python.get("machine"):
        text, _ = wheelhouse.narrowed(text, wheelhouse.Target(python["version"], python["machine"], python.get("glibc", "")))
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?\s*(?:==\s*([^\s;,]+))?", line)
        if not match:
            continue
        name, version = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2] or ""
        # A lock names every wheel of a version; which one is installed is known where there is one alone.
        hashes = re.findall(r"--hash[= ]sha256:([0-9a-f]{64})", line)
        one = {"hashes": [{"alg": "SHA-256", "content": hashes[0]}]} if len(hashes) == 1 else {}
        at = f"@{quote(version, safe='.')}" if version else ""
        found.append({"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}{at}", **one})
    return found


def image(name: str, machine: str) -> Json:
    """Return the component of a container image: ``repository:tag@sha256:digest``, the digest where it is pinned by one."""
    repository, _, digest = name.partition("@")
    repository, _, tag = repository.rpartition(":") if ":" in repository.rsplit("/", 1)[-1] else (repository, "", "")
    if not digest:
        return {"type": "container", "name": repository, "version": tag}
    more = f"&arch={_ARCHES[machine]}" if machine in _ARCHES else ""
    purl = (
        f"pkg:oci/{repository.rsplit('/', 1)[-1].lower()}@{quote(digest, safe='')}?repository_url={quote(repository, safe='/')}"
    )
    purl += f"&tag={quote(tag, safe='.')}" if tag else ""
    hashes = [{"alg": "SHA-256", "content": digest.split(":", 1)[1]}]
    return {"type": "container", "name": repository, "version": tag or digest, "purl": purl + more, "hashes": hashes}


def _put(found: _Found, component: Json, place: str, host: str) -> None:
    key = (component["type"], component["name"], component["version"])
    hosts = found.setdefault(key, (component, {}))[1].setdefault(place, [])
    if host not in hosts:
        hosts.append(host)


def _placed(component: Json, places: Mapping[str, List[str]]) -> Json:
    """Return a component with where it is: one property a virtualenv (or image), its value the hosts."""
    ref = component.get("purl") or f"{component['type']}:{component['name']}@{component['version']}"
    rows = [{"name": f"pd:{place}", "value": ", ".join(hosts)} for place, hosts in places.items()]
    whole = {name: value for name, value in component.items() if value != ""}
    return {"bom-ref": ref, **whole, "properties": rows}
