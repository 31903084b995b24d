"""The ratio grammar."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlib.errors import UserError
from pdlib.ratio import GRAMMAR, Ratio, parse

COUNT = st.integers(1, 10_000)
RATIOS = st.one_of(st.builds(Ratio, prefill=COUNT, decode=COUNT), st.builds(Ratio, aggregated=COUNT))


@given(RATIOS)
def test_a_ratio_reads_back_as_itself(ratio: Ratio) -> None:
    assert parse(str(ratio)) == ratio


@given(RATIOS, st.randoms(use_true_random=False))
def test_case_does_not_matter(ratio: Ratio, random: object) -> None:
    mixed = "".join(c.upper() if random.random() < 0.5 else c for c in str(ratio))  # type: ignore[attr-defined]
    assert parse(mixed) == ratio


@given(RATIOS)
def test_either_prefill_and_decode_or_aggregated(ratio: Ratio) -> None:
    parsed = parse(str(ratio))
    assert parsed.disaggregated == (parsed.aggregated == 0)
    assert (parsed.prefill >= 1 and parsed.decode >= 1) == parsed.disaggregated
    assert parsed.counts() == {r: n for r, n in vars(parsed).items() if n}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3p1d", Ratio(3, 1)),
        ("12P4D", Ratio(12, 4)),
        ("agg", Ratio(aggregated=1)),
        ("AGG", Ratio(aggregated=1)),
        ("1agg", Ratio(aggregated=1)),
        ("4agg", Ratio(aggregated=4)),
    ],
)
def test_words_of_the_grammar(text: str, wanted: Ratio) -> None:
    assert parse(text) == wanted


@pytest.mark.parametrize(
    "text",
    ["3x1d", "0p4d", "4p0d", "3p", "p1d", "1d", "3p 1d", " 3p1d", "3p1d ", "3p1d\n", "", "3p0d", "0agg", "00agg", "-1agg",
     "3p1d2agg", "1.5p1d", "+3p1d", "aggregated", "٣p1d", "³p1d", None, 3, ["3p1d"]],
)  # fmt: skip
def test_anything_else_is_refused_with_the_grammar(text: object) -> None:
    with pytest.raises(UserError) as refused:
        parse(text)  # type: ignore[arg-type]
    assert GRAMMAR in str(refused.value)
    assert repr(text) in str(refused.value)
    assert "NpMd" in GRAMMAR
    assert "3p1d" in GRAMMAR
    assert "Nagg" in GRAMMAR


@given(st.text(alphabet="0123456789pdag xXPD\n", max_size=8))
def test_what_is_accepted_is_canonical_up_to_zeros_and_case(text: str) -> None:
    try:
        ratio = parse(text)
    except UserError:
        return
    assert parse(str(ratio)) == ratio
    letters = "".join(c for c in text.lower() if not c.isdigit())
    assert letters == ("pd" if ratio.disaggregated else "agg")


def test_auto_is_no_ratio_of_a_deployment() -> None:
    with pytest.raises(UserError, match="ratio=auto is for the command line, and for one verb"):
        parse("auto")
