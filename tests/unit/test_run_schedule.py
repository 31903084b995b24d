"""When requests go out: slots are filled and never more, an open loop waits for nobody, conversations keep their order."""

from __future__ import annotations

import heapq
import random

from hypothesis import given
from hypothesis import strategies as st

from pdbench.load.requests import Request
from pdbench.run.schedule import Schedule, split


def talks(lengths: list[int], due: list[float] | None = None, think_s: float = 0.0) -> list[Request]:
    """Conversations of the given numbers of turns, their turns mixed as a trace would have them."""
    made: list[Request] = []
    last: dict[int, int] = {}
    for turn in range(max(lengths, default=0)):
        for talk, length in enumerate(lengths):
            if turn < length:
                at = due[talk] if due and turn == 0 else None
                made.append(Request(len(made), 1, 1, at, last.get(talk), think_s if turn else 0.0))
                last[talk] = made[-1].index
    return made


def play(schedule: Schedule, takes: random.Random) -> tuple[list[tuple[float, Request, float]], int]:
    """Go through a schedule in virtual time; return (sent at, request, wanted) in order, and the most in flight."""
    now, flying, sent, most = 0.0, [], [], 0  # type: ignore[var-annotated]
    while schedule.unended:
        while (found := schedule.take(now)) is not None:
            request, wanted = found
            sent.append((now, request, wanted))
            heapq.heappush(flying, (now + takes.uniform(0.1, 3), request.index, request))
        most = max(most, len(flying))
        end = flying[0][0] if flying else float("inf")
        now = min(end, schedule.due())
        assert now < float("inf"), "nothing is in flight and nothing will be"
        if flying and end <= now:
            schedule.ended(heapq.heappop(flying)[2], now)
    return sent, most


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(1, 8), st.floats(0, 2), st.integers())
def test_a_closed_loop_fills_its_slots_and_never_more(lengths: list[int], slots: int, think_s: float, seed: int) -> None:
    requests = talks(lengths, think_s=think_s)
    sent, most = play(Schedule(requests, 0.0, slots), random.Random(seed))
    assert sorted(r.index for _, r, _ in sent) == list(range(len(requests)))
    assert most == min(slots, len(lengths))
    assert all(at >= wanted for at, _, wanted in sent)
    heads = [r.index for _, r, _ in sent if r.after is None]
    assert heads == sorted(heads)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.floats(0, 2), st.integers())
def test_a_turn_follows_the_end_of_the_one_before(lengths: list[int], think_s: float, seed: int) -> None:
    requests = talks(lengths, think_s=think_s)
    schedule = Schedule(requests, 0.0, 3)
    ends: dict[int, float] = {}
    whole = schedule.ended

    def ended(request: Request, at: float) -> None:
        ends[request.index] = at
        whole(request, at)

    schedule.ended = ended  # type: ignore[method-assign]
    for _, request, wanted in play(schedule, random.Random(seed))[0]:
        if request.after is not None:
            assert wanted == ends[request.after] + think_s


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.integers())
def test_an_open_loop_sends_when_due_whatever_is_unanswered(due: list[float], seed: int) -> None:
    requests = talks([1] * len(due), due)
    sent, _ = play(Schedule(requests, 5.0, None), random.Random(seed))
    assert [wanted for _, _, wanted in sent] == sorted(5.0 + at for at in due)
    assert all(at == wanted for at, _, wanted in sent)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(1, 8), st.integers(0, 60))
def test_a_closed_schedule_sends_nothing_more(lengths: list[int], slots: int, before: int) -> None:
    schedule = Schedule(talks(lengths), 0.0, slots)
    flying = []
    for _ in range(before):
        if (found := schedule.take(1.0)) is not None:
            flying.append(found[0])
        elif flying:
            schedule.ended(flying.pop(0), 1.0)
    schedule.close()
    assert schedule.unended == len(flying)
    while flying:
        assert schedule.take(9.0) is None
        schedule.ended(flying.pop(), 2.0)
    assert (schedule.unended, schedule.take(9.0), schedule.due()) == (0, None, float("inf"))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 12)))
def test_a_split_loses_nothing_and_keeps_conversations_together(lengths: list[int], parts: int, slots: int | None) -> None:
    requests = talks(lengths)
    shares = split(requests, slots, parts)
    assert sorted(r.index for own, _ in shares for r in own) == [r.index for r in requests]
    for own, _ in shares:
        indices = {r.index for r in own}
        assert all(r.after is None or r.after in indices for r in own)
    if slots is None:
        assert [n for _, n in shares] == [None] * parts
    else:
        assert sum(n or 0 for _, n in shares) == slots
        assert all(n for _, n in shares)
