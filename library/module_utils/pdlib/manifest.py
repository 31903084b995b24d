"""Everything that a run was made of, in a form that `bench.yml -e @manifest.json` runs again."""

from __future__ import annotations

from typing import Any, Dict, Mapping

from .variables import BENCH, CLUSTER, VARIABLES

Json = Dict[str, Any]


def make(plan: Mapping[str, Any], settings: Mapping[str, Any], about: Mapping[str, Any]) -> Json:
    """Return the manifest: variables at the top level, all else under ``manifest``.

    ``settings``: the deployment's and the load's values, without secrets; ``about``: versions, hosts, times.
    """
    variables: Json = {}
    for name, value in settings.items():
        row = VARIABLES[name]
        # Defaults and unset values stand in it, too: the inventory may say something else by the time it is run again.
        if row.scope in (CLUSTER, BENCH) and not row.secret:
            variables[name] = value
    variables.update(plan["overrides"])
    variables.update({"ratio": plan["ratio"], "engine_version": plan["engine_version"]})
    if settings.get("run_label"):
        variables["run_label"] = settings["run_label"]
    return {**variables, "manifest": dict(about)}
