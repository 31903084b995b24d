"""Other bench clients in the report: their figures beside ours."""

from __future__ import annotations

from pdbench.gate.rundata import RunData
from pdbench.peers import beside
from pdbench.report.tables import Table


def tables(run: RunData) -> list[Table]:
    """Return one table a peer and load point; none where only ours ran."""
    labels = {point.index: point.label for point in run.points}
    made = []
    for name, number, rows in beside.compared(run.summary):
        head = ["", "pdbench", name, "apart", "how theirs is defined otherwise"]
        cells = [[row.name, beside.figure(row.ours), beside.figure(row.theirs), beside.share(row.apart), row.why] for row in rows]
        caption = f"{beside.title(name)} beside pdbench, after it ({labels.get(number, f'point {number}')})"
        made.append(Table(caption, [(column, 1) for column in head], [], cells, prose=True))
    return made
