"""The report of a sweep as a reader gets it: from run folders to figures and page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from unit.sweepfolder import sweep
from unit.test_import import logs
from unit.test_report_page import Page

from pdbench.cli import main
from pdbench.report.look import DARK, LIGHT
from pdbench.sweep.report import answer, lines
from pdbench.sweep.report.figures import FIGURES, alt, draw, left_out, shown
from pdbench.sweep.report.read import Sweep, load


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three ratios, one run of which the gate refused, and one ratio all of whose runs it refused."""
    folder = tmp_path_factory.mktemp("sweeps") / "night-7"
    bad = {("1p3d-64x6", 1), ("1p3d-64x6", 2), ("1p3d-64x6", 3), ("2p2d-64x6", 2)}
    return sweep(folder, ("4agg", "2p2d", "1p3d"), repeats=3, num_requests=12, emulated=True, invalid=bad)


@pytest.fixture(scope="module")
def read(made: Path) -> Sweep:
    return load(made)


def test_invalid_cells_are_in_no_figure(read: Sweep) -> None:
    assert {cell.config.label for cell in read.table.measured} == {"4agg", "2p2d"}
    for name in ("best", "pareto_user", "throughput", "ttft", "ttft_split", "rate_match", "kv_moved"):
        assert name in shown(read), left_out(read)
        (svg,) = draw(name, read, LIGHT, "svg")
        # lettering is drawn as paths; matplotlib leaves the text as a comment before them
        assert b"1p3d" not in svg, name
        assert b"2p2d" in svg or name == "best", name
        assert b"no GPU was used" in svg, name
    for cell in read.table.cells:
        letter = read.grade(cell).letter
        assert letter == {"1p3d": "X", "2p2d": "C", "4agg": letter}[cell.config.label]
        assert letter in "ABCX"


def test_a_figure_with_nothing_to_show_is_left_out_with_a_sentence(read: Sweep, tmp_path: Path) -> None:
    assert "ttft_by_length" not in shown(read)
    assert lines.lengths(read.table) == []
    assert any("prompt length” is left out: no two prompt lengths" in line for line in left_out(read))
    nothing = load(sweep(tmp_path / "none", ("1p1d",), repeats=1, num_requests=4, invalid={("1p1d-64x6", 1)}))
    assert shown(nothing) == []
    assert len(left_out(nothing)) == len(FIGURES)
    assert answer.answer(nothing.table, nothing.decisions) == [
        "Nothing was shown: no cell of the sweep has a valid repeat with a figure."
    ]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out, which has a test of its own and takes seconds."""
    monkeypatch.setattr("pdbench.sweep.report.page.draw", lambda name, sweep, theme, *kinds: [b"<svg/>" for _ in kinds])


@pytest.mark.usefixtures("quick")
def test_the_page_stands_alone_and_says_the_answer_first(made: Path, read: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(made)]) == 0
    assert capsys.readouterr().out == f"report: {made / 'report.html'}\n"
    html = (made / "report.html").read_text()
    page = Page(html)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loads)
    assert len(page.loads) == 2 * len(shown(read))
    assert "script" not in page.tags
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    tips = re.findall(r'<marker id="([^"]+)"', html)
    assert len(tips) == len(set(tips)) == 3
    order = [page.said.index(heading) for heading in ("The answer", "Figures", "How far to trust it", "How to do it again")]
    assert order == sorted(order)
    assert "The engine was emulated: no GPU was used" in page.said
    assert "2 cells of 6 had no valid repeat with a figure" in page.said
    assert "the KV cache did not move" in page.said
    assert "pdbench sweep" in page.said
    for name in shown(read):
        assert html.count(f'<figure id="{name}">') == 1
        assert {path.suffix for path in (made / "figures").glob(f"{name}.*")} == {".png", ".svg"}
    for tag in html.split("<img ")[1:]:
        assert 'alt="' in tag
        assert "no GPU was used" in tag.split('alt="')[1].split('"')[0]
    for name in FIGURES:
        assert FIGURES[name].how in alt(name, read)


@pytest.mark.usefixtures("quick")
def test_a_figure_of_an_earlier_report_does_not_stay(made: Path) -> None:
    stale = made / "figures" / "ttft_by_length.png"
    stale.write_bytes(b"old")
    (made / "figures" / "mine.png").write_bytes(b"not ours")
    assert main(["report", str(made)]) == 0
    assert not stale.exists()
    assert (made / "figures" / "mine.png").exists()


@pytest.mark.usefixtures("quick")
def test_figures_of_another_tool_are_shown_and_never_called_checked(tmp_path: Path) -> None:
    told = ["--ratio", "disagg=1p1d", "--gpus", "disagg=2"]
    assert main(["import", str(logs(tmp_path / "in")), "--output", str(tmp_path / "old"), *told]) == 0
    assert main(["report", str(tmp_path / "old")]) == 0
    found = load(tmp_path / "old")
    grades = {cell.config.label.split()[0]: found.grade(cell) for cell in found.table.cells}
    assert grades["1p1d"].letter == "C"
    assert "imported: no gate has checked it" in grades["1p1d"].why
    assert grades["agg"].letter == "X"
    assert "imported without its number of GPUs" in grades["agg"].why[0]
    said = Page((tmp_path / "old" / "report.html").read_text()).said
    assert "how they were measured is not known here" in said


def test_a_folder_that_is_no_sweep_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text("[]")
    assert main(["report", str(tmp_path)]) == 1
    assert "Traceback" not in (said := capsys.readouterr().err)
    assert said.startswith("pdbench report: ")


def test_dark_and_light_differ_in_paper_only(read: Sweep) -> None:
    (light,), (dark,) = draw("best", read, LIGHT, "svg"), draw("best", read, DARK, "svg")
    assert b"#ffffff" in light
    assert b"#15181c" in dark
    assert b"#ffffff" not in dark
