"""Damaged folders of runs and sweeps, given to every verb that reads them."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hypothesis import strategies as st
from unit.gate_faults import calibrate
from unit.runfolder import good

from fuzz import law
from fuzz.damage import as_json, spoiled, torn
from pdbench.evidence import read_plan
from pdbench.fit import cases
from pdbench.load.errors import LoadError
from pdbench.profiling import targets
from pdbench.run.folder import recover
from pdbench.sweep.checkout import ROOT as ROOT  # pdlib comes from there

JSON = ("plan.json", "run.json", "summary.json", "evidence.json", "manifest.json", "progress.json", "validity.json")


@functools.cache
def pristine(kind: str = "run") -> Path:
    """A good run's folder, judged; of a killed run (``killed``); of a sweep."""
    folder = Path(tempfile.mkdtemp(prefix="pd-fuzz-"))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if kind == "sweep":
        for number in (1, 2):
            shutil.copytree(pristine(), folder / "runs" / "1p1d-c2" / f"{number}-1")
        cells = [{"id": "1p1d-c2", "variables": {"ratio": "1p1d"}, "deploy": {"ratio": "1p1d"}, "load": {"bench_concurrency": 2}}]
        spec = {"schema": 1, "name": "s", "cells": cells, "order": [["1p1d-c2", 1], ["1p1d-c2", 2]], "spec": {}, "repeats": 2}
        (folder / "sweep.json").write_bytes(as_json(spec))
        return folder
    made = good("1p1d", concurrency=(2,), num_requests=6, chunks=3, isl=8)
    calibrate(made)
    made.write(folder)
    if kind == "killed":
        for name in ("requests.parquet", "summary.json"):
            (folder / name).unlink()
        (folder / "requests.jsonl").write_text("".join(record.to_line() for record in made.records))
    else:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            law.main(["gate", str(folder)])
    return folder


@contextlib.contextmanager
def damaged(data: st.DataObject, kind: str, names: Sequence[str], inside: str = "") -> Iterator[Path]:
    """A copy of a good folder with one file damaged or taken away."""
    with tempfile.TemporaryDirectory(prefix="pd-fuzz-") as parent:
        folder = Path(parent) / "folder"
        shutil.copytree(pristine(kind), folder)
        path = folder / inside / data.draw(st.sampled_from(names))
        if not path.exists():
            path.write_bytes(data.draw(st.sampled_from([b"{}", b"[]", b""])))
        elif data.draw(st.integers(0, 9)) == 0:
            path.unlink()
        elif path.suffix == ".json" and data.draw(st.integers(0, 4)):
            path.write_bytes(data.draw(spoiled(_json(path)).map(as_json)))
        else:
            path.write_bytes(data.draw(torn(path.read_bytes())))
        yield folder


def _json(path: Path) -> object:
    import json

    return json.loads(path.read_bytes())


def gate(data: st.DataObject) -> None:
    """The gate judges what is left: valid or invalid, or it says that there is no run; and it says so again."""
    with damaged(data, "run", (*JSON, "requests.parquet", "selfcheck.json", "clients.json")) as folder:
        code, said, _ = law.command(["gate", folder], (0, 1, 3), "folder")
        assert ("VALID" in said) == (code in (0, 3))


def lost(data: st.DataObject) -> None:
    """A run whose figures or requests are gone is never valid."""
    with damaged(data, "run", ("requests.parquet", "summary.json", "plan.json", "evidence.json")) as folder:
        for name in ("requests.parquet", "summary.json", "plan.json", "evidence.json"):
            path = folder / name
            if path.exists() and path.read_bytes() == (pristine() / name).read_bytes():
                path.unlink()
        assert law.command(["gate", folder], (1, 3), "folder")[0]


def report(data: st.DataObject) -> None:
    """The page is made of what is left, or the verb says why not."""
    with damaged(data, "run", (*JSON, "requests.parquet", "selfcheck.json", "clients.json")) as folder:
        code, *_ = law.command(["report", folder], (0, 1), "folder")
        assert (folder / "report.html").is_file() == (code == 0)


def compare(data: st.DataObject) -> None:
    """A damaged run beside a good one."""
    with damaged(data, "run", (*JSON, "requests.parquet")) as folder:
        law.command(["compare", folder, pristine()], (0, 1, 2, 3), "folder")


def compare_sweep(data: st.DataObject) -> None:
    """A sweep with a damaged run, or with a damaged sweep.json."""
    inside, names = data.draw(st.sampled_from([("", ("sweep.json",)), ("runs/1p1d-c2/1-1", (*JSON, "requests.parquet"))]))
    with damaged(data, "sweep", names, inside) as folder:
        law.command(["compare", folder, pristine()], (0, 1, 2, 3), "folder")


def sweep_report(data: st.DataObject) -> None:
    """The page of such a sweep."""
    inside, names = data.draw(st.sampled_from([("", ("sweep.json",)), ("runs/1p1d-c2/1-1", (*JSON, "requests.parquet"))]))
    with damaged(data, "sweep", names, inside) as folder:
        law.command(["report", folder], (0, 1), "folder")


def export(data: st.DataObject) -> None:
    """A damaged run in another tool's format."""
    with damaged(data, "run", (*JSON, "requests.parquet")) as folder:
        law.command(["export", folder, "--format", "sglang", "--invalid", "--details"], (0, 1, 3), "folder")


def fit(data: st.DataObject) -> None:
    """A damaged run for the performance model's figures."""
    with damaged(data, "run", (*JSON, "requests.parquet")) as folder:
        law.read(lambda: cases.read(folder), LoadError, "folder")


def recovered(data: st.DataObject) -> None:
    """A killed run's folder: what its journal holds is kept, or the line that is none is named."""
    with damaged(data, "killed", ("run.json", "requests.jsonl", "evidence.json", "plan.json")) as folder:
        found = law.read(lambda: recover(folder), LoadError, "folder")
        assert (folder / "summary.json").is_file() == (found is not None)


def merged(data: st.DataObject) -> None:
    """Shares of several clients, one of them damaged."""
    with damaged(data, "run", ("run.json", "summary.json", "requests.parquet", "progress.json")) as folder:
        points = [{"point": 0, "shift_s": 0.0, "offset_s": 0.0, "error_s": 0.0, "drift_s": 0.0, "asked": 6}]
        share = {"schema": 1, "share": [1, 1], "points": points}
        (folder / "share.json").write_bytes(data.draw(st.one_of(st.just(as_json(share)), spoiled(share).map(as_json))))
        law.command(["merge", folder.parent / "all", folder], (0, 1, 3))


def plan_file(data: st.DataObject) -> None:
    """A plan that a load is aimed with."""
    with damaged(data, "run", ("plan.json",)) as folder:
        law.read(lambda: read_plan(folder / "plan.json"), LoadError, "plan.json")
        law.read(lambda: targets.read(folder / "plan.json", "decode", "x"), LoadError, "plan.json", "deployment", "-0")


SURFACES: dict[str, Callable[[st.DataObject], None]] = {
    one.__name__: one for one in (gate, lost, compare, compare_sweep, export, fit, recovered, merged, plan_file)
}
#: drawing takes seconds: for `make fuzz` alone
SLOW: dict[str, Callable[[st.DataObject], None]] = {one.__name__: one for one in (report, sweep_report)}
