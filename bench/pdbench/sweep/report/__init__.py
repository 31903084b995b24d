"""The report of a sweep: report.html and the figures, from the tidy table and the run folders."""

from __future__ import annotations

from pathlib import Path


def write(folder: Path) -> Path:
    """Write figures/ and report.html into a sweep's folder and return the page's path. Raise NotARun, OSError."""
    from pdbench.sweep.report.page import make  # matplotlib and pandas take a second

    return make(folder)
