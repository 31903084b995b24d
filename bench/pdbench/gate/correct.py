"""Check on the contents of the KV cache: what decode workers answered, against what prefill workers say of it."""

from __future__ import annotations

from pdbench.gate.check import Check, some
from pdbench.gate.rundata import Json, RunData

_ID = "kv-correct"


def correct(run: RunData) -> Check:
    """The KV cache of every pair arrives right, where bench_verify_outputs asked for that: answers are those of the prompts."""
    found = run.verified
    asked = run.verify_outputs or found.get("prompts", 0)
    if not run.disaggregated:
        return Check(_ID, True, None, "aggregated workers move no KV cache", {})
    if not asked:
        return Check(_ID, True, None, "not checked (bench_verify_outputs is 0)", {})
    if found.get("reason"):
        message = f"whether the KV cache arrives right was not checked: {found['reason']}"
        return Check(_ID, True, None, message, {**found, "caution": message})
    rows: list[Json] = [row for row in found.get("pairs") or [] if isinstance(row, dict)]
    told = {(row.get("prefill"), row.get("decode")): row for row in rows}
    faults = []
    for pair in run.plan.get("pairs") or []:
        name, row = f"{pair['prefill']} to {pair['decode']}", told.get((pair["prefill"], pair["decode"]), {})
        wrong, prompts = row.get("wrong_prompts"), row.get("prompts")
        if wrong:
            faults.append(
                f"{name}: the KV cache of {wrong} of {prompts} prompts arrived wrong ({row.get('wrong_tokens')} of "
                f"{row.get('tokens')} tokens are not the prefill worker's, up to {row.get('worst_nats', 0.0):.3g} nats a token)"
            )
        if row.get("error"):
            faults.append(f"{name}: could not be verified: {row['error']}")
        elif prompts != asked or not row.get("tokens"):
            faults.append(f"{name}: {prompts or 0} of {asked} prompts were verified")
    if not told:
        faults = [f"the run was to verify {asked} prompts a pair, and recorded nothing of it"]
    worst = max((row.get("worst_nats") or 0.0 for row in rows), default=0.0)
    message = some(faults, 3) or (
        f"{asked} prompts over each of {len(rows)} pairs: the answers are the prefill workers' own, "
        f"within {worst:.2g} nats a token (bound {found.get('limit_nats')})"
    )
    return Check(_ID, not faults, None, message, found)
