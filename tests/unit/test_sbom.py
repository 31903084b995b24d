"""The bill of materials says what the locks install on every host, and nothing twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from unit.plans import h200, host, plan

from pdlib import sbom

REPO = Path(__file__).resolve().parents[2]
PYTHON = {"version": "3.11.9", "machine": "x86_64", "glibc": "2.36"}
A = "a" * 64
LOCK = (
    "Foo_Bar.x==1.2 ; python_full_version >= '3.11' \\\n    --hash=sha256:" + "a" * 64 + " \\\n    --hash=sha256:" + "b" * 64
    + "\n    # via x\nonly-win==3 ; sys_platform == 'win32' \\\n    --hash=sha256:" + "c" * 64
    + "\none[extra]==4.0+cu129 \\\n    --hash=sha256:" + "d" * 64 + "\n-c other.txt\n"
)  # fmt: skip


def texts() -> dict[str, str]:
    return {f"requirements/{path.name}": path.read_text() for path in (REPO / "requirements").glob("*.txt")}


def named(made: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in made["components"] if one["name"] == name)


def test_a_lock_becomes_components_of_the_host() -> None:
    first, second = sbom.packages(LOCK, PYTHON)
    assert (first["name"], first["version"], first["purl"]) == ("foo-bar-x", "1.2", "pkg:pypi/foo-bar-x@1.2")
    assert "hashes" not in first, "which of two wheels is installed is not known"
    assert (second["name"], second["purl"]) == ("one", "pkg:pypi/one@4.0%2Bcu129")
    assert second["hashes"] == [{"alg": "SHA-256", "content": "d" * 64}]
    assert [one["name"] for one in sbom.packages(LOCK, {})] == ["foo-bar-x", "only-win", "one"], "its Python is not known"


def test_a_deployment_s_packages_model_and_places() -> None:
    made_plan = h200("1p1d")
    made = sbom.make(made_plan, {"h200": {"python": PYTHON}}, texts(), "e" * 64)
    engine = named(made, "sglang")
    assert engine["version"] == made_plan["engine_version"]
    assert {"name": f"pd:sglang-{made_plan['engine_version']}", "value": "h200"} in engine["properties"]
    assert named(made, "sglang-router")["version"] == made_plan["router"]["version"]
    assert named(made, "openai/gpt-oss-120b")["hashes"][0]["content"] == "e" * 64
    assert len(made["components"]) > 100
    refs = [one["bom-ref"] for one in made["components"]]
    assert len(set(refs)) == len(refs)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", made["serialNumber"])
    assert sbom.make(made_plan, {"h200": {"python": PYTHON}}, texts(), "e" * 64) == made
    assert len(json.dumps(made)) < 300_000


def test_hosts_that_have_the_same_share_a_component() -> None:
    made_plan = plan({"a": host(1), "b": host(2)}, "4p4d")
    made = sbom.make(made_plan, {}, texts())
    rows = {row["name"]: row["value"] for row in named(made, "supervisor")["properties"]}
    assert rows == {"pd:supervisor": "a, b"}
    assert not [one for one in made["components"] if one["type"] == "machine-learning-model"], "emulated: no model"


@pytest.mark.parametrize(
    ("name", "version", "purl"),
    [
        (f"lmsysorg/sglang:v1@sha256:{A}", "v1", f"pkg:oci/sglang@sha256%3A{A}?repository_url=lmsysorg/sglang"),
        ("127.0.0.1:5000/x/y:2", "2", None),
        (f"127.0.0.1:5000/x/y@sha256:{A}", f"sha256:{A}", f"pkg:oci/y@sha256%3A{A}?repository_url=127.0.0.1%3A5000/x/y"),
    ],
)  # fmt: skip
def test_an_image_is_known_by_its_digest(name: str, version: str, purl: str | None) -> None:
    found = sbom.image(name, "aarch64")
    assert found["version"] == version
    assert (found.get("purl") or "").startswith(purl or "")
    assert ("hashes" in found) == (purl is not None)
    assert purl is None or found["purl"].endswith("arch=arm64")


def test_images_and_environments_of_the_user_s_are_named() -> None:
    made_plan = h200("1p1d")
    runtime = {"kind": "docker", "image": "lmsysorg/sglang:v0.5.23@sha256:" + "a" * 64}
    made_plan["hosts"]["h200"]["runtime"] = runtime
    made = sbom.make(made_plan, {}, {})
    assert named(made, "lmsysorg/sglang")["properties"] == [{"name": "pd:docker", "value": "h200"}]
    made_plan["hosts"]["h200"]["runtime"] = {
        "kind": "existing",
        "package": "sglang",
        "version": "0.5.23",
        "python": "/e/bin/python",
    }
    made = sbom.make(made_plan, {}, {})
    assert named(made, "sglang")["properties"] == [{"name": "pd:existing environment of /e/bin/python", "value": "h200"}]
