"""A run's folder on the client host: what is written when, and how a broken-off run is put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from pdbench import shapes
from pdbench.load.errors import LoadError
from pdbench.metrics import Slo
from pdbench.reading import json_of
from pdbench.records import Record, read_jsonl, write_json, write_parquet
from pdbench.run.digest import to_record
from pdbench.run.spool import clear, leftover
from pdbench.run.summary import Bounds, Json, Setup, point_summary, whole_summary
from pdbench.run.watch import UNKNOWN


@dataclass(frozen=True)
class Folder:
    """The files of a run."""

    path: Path

    @property
    def journal(self) -> Path:
        """Records as they come, one a line; gone once requests.parquet stands."""
        return self.path / "requests.jsonl"

    @property
    def setup(self) -> Path:
        """What the run was asked to do."""
        return self.path / "run.json"

    @property
    def parquet(self) -> Path:
        """All records."""
        return self.path / "requests.parquet"

    @property
    def summary(self) -> Path:
        """The figures."""
        return self.path / "summary.json"

    @property
    def progress(self) -> Path:
        """Where the run stands."""
        return self.path / "progress.json"

    @property
    def evidence(self) -> Path:
        """What the servers said before and after each point."""
        return self.path / "evidence.json"

    @property
    def server_metrics(self) -> Path:
        """What the servers said during the points."""
        return self.path / "server_metrics.parquet"

    def check(self) -> None:
        """Raise LoadError when another run is in the folder."""
        for old in (self.summary, self.parquet, self.journal):
            if old.exists():
                recover = f", or keep it with: pdbench run --recover {self.path}" if old == self.journal else ""
                raise LoadError(f"{self.path} already holds a run ({old.name}); choose another --output{recover}")

    def begin(self, setup: Setup) -> None:
        """Make the folder and write what the run is asked to do; raise OSError when it cannot be written."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.setup, {"schema": 1, **asdict(setup)})
        self.journal.touch()

    def finish(
        self, setup: Setup, clients: Mapping[int, Mapping[str, object]], missing: Sequence[str], not_run: str = ""
    ) -> Json:
        """Turn the journal into requests.parquet and summary.json, and return the summary.

        The journal goes once the rest stands; the arguments are those of `conclude`. Raise OSError, ValueError.
        """
        summary = self.conclude(list(read_jsonl(self.journal)), setup, clients, missing, not_run)
        self.journal.unlink()
        return summary

    def conclude(
        self,
        records: Sequence[Record],
        setup: Setup,
        clients: Mapping[int, Mapping[str, object]],
        missing: Sequence[str],
        not_run: str = "",
    ) -> Json:
        """Write requests.parquet and summary.json, and return the summary; raise OSError.

        ``clients`` holds what the client measured of itself at each point (a point without: unknown); ``missing`` are
        reasons why the run as a whole is invalid, ``not_run`` is why the points that are left were not measured.
        """
        write_parquet(self.parquet, records)
        evidence = _read_evidence(self.evidence)
        points = [
            point_summary(setup, number, records, clients.get(number, UNKNOWN), evidence.get(number))
            for number in _reached(records, setup, clients)
        ]
        summary = whole_summary(setup, points, missing, not_run)
        write_json(self.summary, summary)
        return summary


def _reached(records: Sequence[Record], setup: Setup, clients: Mapping[int, object]) -> list[int]:
    seen = {r.point for r in records} | set(clients)
    return [number for number in range(len(setup.points)) if number in seen]


def recover(path: Path) -> tuple[Setup, Json]:
    """Build requests.parquet and summary.json of a run that was killed; the summary says that it is incomplete.

    Raise LoadError when there is nothing to recover.
    """
    folder = Folder(path)
    if not folder.journal.exists():
        if folder.summary.exists():
            raise LoadError(f"{path} holds a finished run (summary.json): there is nothing to recover")
        raise LoadError(f"{path} holds no run to recover: requests.jsonl is missing")
    try:
        setup = read_setup(folder.setup)
        _digest_leftover(folder)
        summary = folder.finish(setup, {}, ["recovered: the run was broken off, what it had recorded is kept"])
        write_json(folder.progress, _stopped(summary))
    except (ValueError, TypeError, KeyError, OverflowError) as why:
        raise LoadError(f"{path} cannot be recovered: {why}") from None
    return setup, summary


def _digest_leftover(folder: Folder) -> None:
    known = {(record.point, record.phase, record.index) for record in read_jsonl(folder.journal)}
    whole = folder.journal.read_bytes()
    with folder.journal.open("r+b") as lines:
        lines.seek(whole.rfind(b"\n") + 1)  # over the half line that a killed process leaves
        for raw in leftover(folder.path):
            record, _ = to_record(raw)
            if (record.point, record.phase, record.index) not in known:
                lines.write(record.to_line().encode())
    clear(folder.path)


def _read_evidence(path: Path) -> dict[int, Json]:
    """Return the points of evidence.json by number; none where the file is not there or not whole."""
    try:
        return {entry["point"]: entry for entry in json_of(path.read_text(encoding="utf-8"))["points"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_setup(path: Path) -> Setup:
    """Return what run.json says; raise ValueError when it is none."""
    try:
        raw = json_of(path.read_text(encoding="utf-8"))
        if fault := shapes.wrong(raw, shapes.SETUP):
            raise TypeError(fault)
        raw.pop("schema")
        return Setup(**{**raw, "slo": Slo(**raw["slo"]), "bounds": Bounds(**raw["bounds"])})
    except OSError as why:
        raise ValueError(f"{path.name}: {why.strerror or why}") from None
    except (KeyError, TypeError, AttributeError) as why:
        raise ValueError(f"{path.name} is not what `pdbench run` writes: {why}") from None


def _stopped(summary: Json) -> Json:
    points = cast(list[Json], summary["points"])
    done = cast(int, points[-1]["completed"]) + cast(int, points[-1]["failed"]) if points else 0
    return {
        "state": "stopped",
        "point": len(points),
        "points": len(points),
        "done": done,
        "total": cast(int, points[-1]["num_requests"]) if points else 0,
        "failed": cast(int, points[-1]["failed"]) if points else 0,
        "elapsed_s": 0.0,
        "eta_s": 0.0,
        "message": "the run was broken off; what it had recorded was recovered",
    }
