"""What the actions on the controller do with secrets."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fuzz import planning
from unit import plans

from pdlib import keys
from pdlib.errors import UserError

REPO = Path(__file__).resolve().parents[2]


def action(name: str) -> Any:
    """An action without its task."""
    found = importlib.util.spec_from_file_location(f"{name}_action", REPO / "plugins" / "action" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.ActionModule.__new__(module.ActionModule)


def test_the_hubs_token_goes_where_a_unit_reads_it_and_nowhere_else(tmp_path: Path) -> None:
    variables = {"inventory_hostname": "h1", "hostvars": {"h1": {"hf_token": "hf_x", "api_key": "k"}}}
    unit = {"argv": ["python"], "env": {}}

    def handed(*units: dict[str, Any]) -> object:
        return action("pd_poll").secrets(variables, {"folder": str(tmp_path)}, units)

    assert handed(unit) == {keys.API: "k"}
    assert handed(unit, {**unit, "env": keys.hub_env("/var/lib/pd")}) == {keys.API: "k", keys.HUB: "hf_x"}


@pytest.mark.parametrize("name", ["api_key", "hf_token"])
def test_who_measures_or_rebalances_has_the_secrets_of_the_deployment(name: str, tmp_path: Path) -> None:
    own = {"engine": "sglang", "model": "org/m", "service_manager": "systemd", "state_dir": "/var/lib/pd"}
    host = {**plans.host(1), **own}
    deployed = tmp_path / "plan.json"
    deployed.write_text(json.dumps(plans.plan({"h1": host}, "1p1d", **{name: "s3cret"})))
    module = planning.action()
    one: Any = module.ActionModule.__new__(module.ActionModule)
    one._task, one._loader = SimpleNamespace(args={"verb": "rebalance"}), None
    names = ["h1"]
    facts = {
        "groups": {**dict.fromkeys(("prefill_nodes", "decode_nodes", "router"), names), "bench_clients": []},
        "hostvars": planning.Vars({"h1": {**host, "current_plan": str(deployed), "ratio": "2p1d"}}),
        "inventory_hostname": "h1",
        "ansible_play_hosts_all": names,
    }
    with (
        planning._typed({"ratio": "2p1d"}),
        pytest.raises(UserError, match=f"^the deployment has an {name}, and rebalance.yml has none"),
    ):
        one._run(facts)
