"""report.html of a sweep: the answer first, then the figures, then how far to trust them and how to do it again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pdbench import __version__, attribution
from pdbench.records import replacing
from pdbench.report.draw import inline
from pdbench.report.look import DARK, LIGHT, ROLE_COLOURS
from pdbench.report.page import template
from pdbench.report.picture import cluster
from pdbench.report.words import definitions
from pdbench.sweep import trust
from pdbench.sweep.report import answer, choose, inside
from pdbench.sweep.report.figures import FIGURES, alt, draw, left_out, shown
from pdbench.sweep.report.read import Json, Sweep, load

REPORT, FOLDER = "report.html", "figures"


def make(folder: Path) -> Path:
    """Write the figures and the page into a sweep's folder and return the page's path. Raise NotARun, OSError."""
    sweep = load(folder)
    (folder / FOLDER).mkdir(exist_ok=True)
    light = {}
    for name in shown(sweep):
        png, light[name] = draw(name, sweep, LIGHT, "png", "svg")
        for kind, content in (("png", png), ("svg", light[name])):
            with replacing(folder / FOLDER / f"{name}.{kind}") as temporary:
                temporary.write_bytes(content)
    for old in (folder / FOLDER).glob("*.*g"):
        # A figure of an earlier report that has nothing to show any more would contradict the page.
        if old.stem in FIGURES and old.stem not in light:
            old.unlink()
    page = folder / REPORT
    with replacing(page) as temporary:
        temporary.write_text(render(sweep, light), encoding="utf-8")
    return page


def render(sweep: Sweep, light: dict[str, bytes]) -> str:
    """Return the page; ``light``: figure name -> its SVG on white (the dark ones are drawn here)."""
    table = sweep.table
    grades = [(cell, sweep.grade(cell)) for cell in table.cells]
    counts = Counter(grade.letter for _, grade in grades)
    return template("pdbench.sweep.report").render(
        title=f"Sweep {sweep.name}",
        about=_about(sweep),
        version=__version__,
        paragraphs=answer.answer(table, sweep.decisions),
        caveats=answer.caveats(table, sweep.decisions, _unmeasured(sweep)),
        cautions=sweep.cautions,
        counts=[(letter, counts[letter], rule) for letter, rule in trust.RULES.items()],
        best=[answer.best_table(table, sweep.decisions)] if sweep.decisions else [],
        intervals=choose.IN_SHORT,
        plots=[
            (
                name,
                FIGURES[name].title,
                FIGURES[name].how,
                alt(name, sweep),
                inline(light[name]),
                inline(draw(name, sweep, DARK, "svg")[0]),
            )
            for name in light
        ],
        left_out=left_out(sweep),
        split=[f"{label}: {attribution.in_words(found)}" for label, found in inside.stages(sweep)],
        trust=[answer.trust_table(table, grades)],
        pictures=[(config.label, _picture(plan, n)) for n, (config, plan) in enumerate(sweep.plans.items())],
        commands=_commands(sweep),
        versions=_versions(sweep),
        runs=_runs(sweep),
        spec=json.dumps(sweep.about, indent=2, ensure_ascii=False, sort_keys=True),
        definitions=definitions(),
        roles=ROLE_COLOURS,
    )


def _about(sweep: Sweep) -> str:
    rows, table = sweep.rows, sweep.table
    models = sorted({load.model for load in table.loads})
    begun = sorted(str(row["begin"])[:16] for row in rows if row.get("begin"))
    when = f", measured {begun[0]} to {begun[-1]} UTC" if begun else ""
    many = len({(row.get("cell"), row.get("repeat")) for row in rows})
    return (
        f"{', '.join(models) or 'no model'}: {len(table.configs)} configurations, {len(table.loads)} loads, "
        f"{many} runs, {len(rows)} load points{when}."
    )


def _picture(plan: Json, number: int) -> Markup:
    """Return the picture of a plan; its arrow heads have names of their own: a page has several pictures."""
    return Markup(str(cluster(plan)).replace("url(#tip)", f"url(#tip{number})").replace('id="tip"', f'id="tip{number}"'))


def _unmeasured(sweep: Sweep) -> list[str]:
    ran = {row.get("cell") for row in sweep.rows}
    return [str(cell["id"]) for cell in sweep.about.get("cells") or [] if cell.get("id") not in ran]


def _listed(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []


def _commands(sweep: Sweep) -> list[str]:
    """Return what to type for the whole sweep again, and for one of its runs."""
    inventories = _listed(sweep.about.get("inventory"))
    given = "".join(f" -i {inventory}" for inventory in inventories)
    source = str(sweep.about.get("source") or "")
    if source:
        return []
    path = str(sweep.about.get("spec_file") or "SPEC.yml")
    commands = [f"pdbench sweep {path}{given}{' --rehearse' if sweep.about.get('rehearsal') else ''}"]
    row = next((row for row in sweep.rows if row.get("run") and (sweep.run(row) / "manifest.json").is_file()), None)
    if row:
        commands.append(
            f"ansible-playbook bench.yml{given} -e @results/sweeps/{sweep.folder.resolve().name}/{row['run']}/manifest.json"
        )
    return commands


def _versions(sweep: Sweep) -> list[tuple[str, str]]:
    """Return (what, its version or versions over all runs): more than one value is worth seeing."""
    found: dict[str, dict[str, None]] = {}

    def note(what: str, value: object) -> None:
        if value not in (None, "", {}, []):
            found.setdefault(what, {})[str(value)] = None

    for _, manifest in sweep.manifests():
        about: Json = manifest.get("manifest") or {}
        for what, value in (about.get("versions") or {}).items():
            note(what, value)
        git = about.get("git") or {}
        note("git commit", git.get("commit"))
        note("files changed since it", ", ".join(git.get("changed_files") or []))
        note("model", manifest.get("model"))
        note("model revision", manifest.get("model_revision"))
    return [(what, ", ".join(values)) for what, values in found.items()]


def _runs(sweep: Sweep) -> list[str]:
    return list(dict.fromkeys(str(row["run"]) for row in sweep.rows if row.get("run")))
