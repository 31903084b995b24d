"""report.html: one file that says what was deployed, what was measured and whether to believe it."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources

import jinja2

from pdbench import __version__
from pdbench.gate.rundata import RunData
from pdbench.peers import beside
from pdbench.report import peers, split, words
from pdbench.report.draw import inline
from pdbench.report.figures import FIGURES, Sheet, draw
from pdbench.report.look import DARK, ROLE_COLOURS
from pdbench.report.picture import cluster
from pdbench.report.tables import results

_PAGE = "page.html.j2"


def template(package: str) -> jinja2.Template:
    """Return the page.html.j2 of a package; it may include files of `pdbench.report`, which all pages share."""

    def source(name: str) -> str:
        home = package if name == _PAGE else "pdbench.report"
        return resources.files(home).joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_PAGE)


def render(run: RunData, verdict: words.Verdict, sheet: Sheet, light: dict[str, bytes]) -> str:
    """Return the page; ``light``: figure name -> its SVG on white (the dark ones are drawn here)."""
    dark = replace(sheet, theme=DARK)
    plots = [(name, FIGURES[name][1]) for name in light]
    ratio, model = run.plan.get("ratio") or "unknown ratio", run.plan.get("model") or "unknown model"
    return template("pdbench.report").render(
        name=run.folder.resolve().name,
        title=f"{ratio} · {model}",
        version=__version__,
        verdict=verdict,
        no_gpu=run.no_gpu,
        truncated=run.truncated,
        deployment=words.deployment(run) + words.seen(verdict),
        workload=words.workload(run),
        picture=cluster(run.plan) if run.plan else "",
        tables=[*results(run.points), *peers.tables(run)],
        split=split.sentences(run.points),
        notes=[*words.notes(run.points, verdict), *beside.problems(run.summary)],
        plots=[(name, text, inline(light[name]), inline(draw(name, dark, "svg")[0])) for name, text in plots],
        missing=words.missing(run),
        definitions=words.definitions(),
        labels={point.index: point.label for point in run.points},
        manifest=json.dumps(run.manifest, indent=2, ensure_ascii=False) if run.manifest else "",
        roles=ROLE_COLOURS,
    )
