"""Laws of one worker and of a deployment in virtual time."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, cycle, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdbench.model import profile
from pdbench.model.cluster import Deployment, Outcome, Prompt, Simulation, deployment
from pdbench.model.profile import Profile
from pdbench.model.radix import pack
from pdbench.model.rates import Rates
from pdbench.model.requests import Limits, Request, Step, Token, Way
from pdbench.model.scheduler import Worker

TINY = profile.load("tiny")
H200 = profile.load("h200-qwen2.5-3b")
BIG = Limits(capacity=10**6, max_running=256, chunk=8192, reserved=512, prefix_cache=True)
lengths = st.tuples(st.integers(1, 3000), st.integers(1, 60))
loads = st.lists(st.tuples(lengths, st.floats(0, 3)), min_size=1, max_size=25)
ratios = st.sampled_from([(0, 0, 1), (0, 0, 2), (1, 1, 0), (2, 1, 0), (1, 2, 0), (2, 2, 0)])


def prompts(load: list[tuple[tuple[int, int], float]]) -> list[Prompt]:
    return [Prompt(isl, osl, due) for (isl, osl), due in sorted(load, key=lambda row: row[1])]


def small(ratio: tuple[int, int, int], own: Limits, figures: Profile = TINY) -> Deployment:
    rates = Rates(figures)
    prefill, decode, aggregated = ([Worker(rates, own) for _ in range(number)] for number in ratio)
    return Deployment(prefill, decode, aggregated, transport=lambda here, there: ("cuda_ipc", "rdma", "tcp")[(here + there) % 3])


def complete(outcomes: list[Outcome]) -> None:
    """Tokens in = tokens out, in order, after they were asked for."""
    for outcome in outcomes:
        assert len(outcome.tokens) == outcome.prompt.output_tokens
        assert outcome.tokens == sorted(outcome.tokens)
        assert outcome.ttft > 0


def run_alone(worker: Worker, requests: list[Request], until: float = 1e9) -> list[Token]:
    for request in requests:
        worker.submit(0.0, request)
    due: list[Token] = []
    while worker.next_at <= until:
        at = worker.next_at
        worker.advance(at)
        due += worker.tokens(at)
    return due


@settings(max_examples=30, deadline=None)
@given(loads, ratios, st.sampled_from([TINY, H200]))
def test_every_request_gets_all_its_tokens_and_leaves_nothing_behind(
    load: list[tuple[tuple[int, int], float]], ratio: tuple[int, int, int], figures: Profile
) -> None:
    cluster = small(ratio, BIG, figures)
    complete(Simulation(cluster).open_loop(prompts(load)))
    for worker in [*cluster.prefill, *cluster.decode, *cluster.aggregated]:
        assert worker.idle
        assert worker.used == 0


@settings(max_examples=30, deadline=None)
@given(loads, ratios, st.integers(3100, 9000), st.integers(64, 4096), st.integers(1, 20))
@example([((1, 1), 0.0), ((1, 1), 0.0)], (1, 1, 0), 3100, 64, 1)
def test_memory_is_never_overdrawn_and_nobody_waits_for_ever(
    load: list[tuple[tuple[int, int], float]], ratio: tuple[int, int, int], capacity: int, chunk: int, most: int
) -> None:
    cluster = small(ratio, Limits(capacity, most, chunk, 16, prefix_cache=True))
    workers = [*cluster.prefill, *cluster.decode, *cluster.aggregated]

    def within(step: Step) -> None:
        assert step.requests > 0
        for worker in workers:
            assert worker.used <= worker.memory.own_tokens + worker.memory.cache.total <= capacity

    for worker in workers:
        worker.on_step = within
    complete(Simulation(cluster).open_loop(prompts(load)))
    assert all(worker.idle and worker.used == 0 for worker in workers)


@settings(max_examples=25, deadline=None)
@given(loads, st.integers(3100, 9000), st.lists(st.floats(0, 0.2), min_size=5, max_size=40))
def test_a_driver_that_wakes_up_late_gets_the_same_schedule(
    load: list[tuple[tuple[int, int], float]], capacity: int, naps: list[float]
) -> None:
    def times(wake_ups: Iterator[float]) -> list[tuple[float, object, int]]:
        worker, seen = Worker(Rates(H200), replace(BIG, capacity=capacity, prefix_cache=False)), []
        arrivals = deque((p.due, Request("local", p.prompt_tokens, p.output_tokens, tag=n)) for n, p in enumerate(prompts(load)))
        for now in wake_ups:
            while arrivals and arrivals[0][0] <= now:  # stamped when it came, taken when the driver woke up
                worker.submit(*arrivals.popleft())
            worker.advance(now)
            seen += [(at, request.tag, number) for at, request, number in worker.tokens(now)]
            if not arrivals and worker.idle:
                return seen
        raise AssertionError

    assert times(accumulate(cycle([0.0007]))) == times(accumulate(cycle([*naps, 0.01])))


@settings(max_examples=30, deadline=None)
@given(loads, ratios, st.integers(3100, 20000), st.randoms(use_true_random=False))
def test_what_is_aborted_anywhere_gives_everything_back(
    load: list[tuple[tuple[int, int], float]], ratio: tuple[int, int, int], capacity: int, chance: random.Random
) -> None:
    if not ratio[2]:
        ratio = (0, 0, 1)
    worker = Worker(Rates(H200), replace(BIG, capacity=capacity))
    requests = [
        Request(
            chance.choice(("local", "send", "receive")),
            p.prompt_tokens,
            p.output_tokens,
            pack([chance.randrange(3)] * p.prompt_tokens),
            "x",
            "tcp",
        )
        for p in prompts(load)
    ]
    now = 0.0
    for request in requests:
        worker.submit(now, request)
        if chance.random() < 0.6:
            worker.grant(now, request)
            worker.found(now, request)
    for request in chance.sample(requests, len(requests)):
        now += chance.random() / 10
        for event in worker.advance(now):
            if event.kind == "granted" and chance.random() < 0.5:
                worker.deliver(now, event.request, 10**6)
        worker.abort(now, request)
    assert worker.used == 0
    assert worker.advance(now + 1000) == []
    assert worker.tokens(now + 1000) == []
    assert worker.idle


@pytest.mark.parametrize("figures", [TINY, H200])
@pytest.mark.parametrize("ratio", [(0, 0, 1), (1, 1, 0), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("resource", ["compute", "memory bandwidth", "link", "front end", "kv memory", "slots", "worker"])
def test_throughput_never_rises_when_a_resource_shrinks(figures: Profile, ratio: tuple[int, int, int], resource: str) -> None:
    chance = random.Random(f"{ratio}{resource}")
    load = [Prompt(chance.randint(64, 2000), chance.randint(16, 128)) for _ in range(100)]
    own, engine, gpu = replace(BIG, capacity=60000), figures.engine, figures.gpu

    def rate(share: float) -> float:
        size, limits, one = ratio, own, figures
        if resource == "compute":
            one = replace(figures, gpu=replace(gpu, tflops=gpu.tflops * share))
        elif resource == "memory bandwidth":
            one = replace(figures, gpu=replace(gpu, bandwidth_gb_per_s=gpu.bandwidth_gb_per_s * share))
        elif resource == "link":
            ways = {
                name: replace(way, bandwidth_gb_per_s=way.bandwidth_gb_per_s * share) for name, way in figures.transports.items()
            }
            one = replace(figures, transports=ways)
        elif resource == "front end":
            one = replace(figures, engine=replace(engine, frontend_us_per_token=50 / share))
        elif resource == "kv memory":
            limits = replace(own, capacity=int(own.capacity * share))
        elif resource == "slots":
            limits = replace(own, max_running=int(64 * share))
        elif share < 1:
            size = (max(1, ratio[0] - 1) if ratio[0] else 0, max(1, ratio[1] - 1) if ratio[1] else 0, ratio[2])
        outcomes = Simulation(small(size, limits, one)).closed_loop(load, 64)
        complete(outcomes)
        return len(load) / max(outcome.end for outcome in outcomes)

    rates = [rate(share) for share in (1.0, 0.7, 0.4, 0.2)]
    # Scheduling is not monotone to the last digit (which request meets which batch changes): 3 % are allowed to it.
    assert all(less <= more * 1.03 for more, less in pairwise(rates)), rates


def test_a_lone_request_takes_what_the_formulas_say() -> None:
    rates = Rates(TINY)
    worker = Worker(rates, BIG)
    tokens = run_alone(worker, [Request("local", 512, 3)])
    first = rates.prefill_s([(512, 0)])
    second = first + rates.decode_s(1, 513)
    assert [at for at, _, _ in tokens] == pytest.approx([first, second, second + rates.decode_s(1, 514)])


def test_pd_adds_the_transfer_and_the_decode_worker_makes_every_token_but_the_first() -> None:
    rates = Rates(TINY)
    cluster = deployment(rates, 1, 1)
    (outcome,) = Simulation(cluster).open_loop([Prompt(512, 3)])
    way = TINY.transports["cuda_ipc"]
    first = rates.prefill_s([(512, 0)]) + rates.transfer_s(rates.kv_bytes(512), "cuda_ipc") + way.latency_ms / 1e3
    assert outcome.tokens == pytest.approx(
        [first, first + rates.decode_s(1, 513), first + rates.decode_s(1, 513) + rates.decode_s(1, 514)]
    )


def test_the_first_transfer_of_a_pair_waits_for_its_connection() -> None:
    cold = Simulation(deployment(Rates(H200), 1, 1), warm=False).open_loop([Prompt(512, 2), Prompt(512, 2, 10.0)])
    warm = Simulation(deployment(Rates(H200), 1, 1)).open_loop([Prompt(512, 2)])
    assert cold[0].ttft == pytest.approx(warm[0].ttft + 2.0, abs=0.02)
    assert cold[1].ttft == pytest.approx(warm[0].ttft)


def test_long_prompts_are_cut_into_chunks_and_their_kv_travels_while_the_next_one_computes() -> None:
    rates = Rates(TINY)
    steps: list[Step] = []
    worker = Worker(rates, replace(BIG, chunk=1024))
    worker.on_step = steps.append
    request = Request("send", 3000, 1, peer="d", transport="tcp")
    worker.connect("d")
    worker.submit(0.0, request)
    worker.grant(0.0, request)
    events = []
    while worker.next_at < 100:
        now = worker.next_at
        events += worker.advance(now)
        worker.tokens(now)
    assert [(step.tokens, step.context) for step in steps] == [(1024, 0), (1024, 1024), (952, 2048)]
    # only the last chunk's KV is still to be sent when the computing ends
    sent = next(event for event in events if event.kind == "answered")
    assert sent.took == pytest.approx(rates.transfer_s(rates.kv_bytes(952), "tcp") + 0.002, rel=1e-3)
    assert request.sent_bytes == rates.kv_bytes(3000)


@pytest.mark.parametrize("way", ["local", "send"])
def test_the_stages_of_a_first_token_are_told_and_add_up(way: Way) -> None:
    worker = Worker(Rates(TINY), replace(BIG, chunk=1024))
    told: dict[str, list[float]] = {}
    worker.on_stage = lambda stage, seconds: told.setdefault(stage, []).append(seconds)
    requests = [Request(way, 2500, 1, peer="d", transport="tcp") for _ in range(3)]
    ends: list[float] = []
    for request in requests:
        worker.submit(0.0, request)
        if way == "send":
            worker.grant(0.0, request)
    worker.on_step = lambda step: ends.append(step.end)
    while worker.next_at < 1e6:
        now = worker.next_at
        worker.advance(now)
        worker.tokens(now)
    assert {stage: len(seconds) for stage, seconds in told.items()} == {"prefill_waiting": 3, "prefill_forward": 3}
    # All came at once and left the queue one after the other: the last one's stages reach to the last step's end.
    start = max(request.queued for request in requests)
    assert start + told["prefill_waiting"][-1] + told["prefill_forward"][-1] == pytest.approx(max(ends), rel=0.05)


def test_prefill_goes_before_decode_on_an_aggregated_worker() -> None:
    worker = Worker(Rates(TINY), BIG)
    steps: list[Step] = []
    worker.on_step = steps.append
    worker.submit(0.0, Request("local", 100, 50))
    worker.advance(0.2)
    worker.submit(0.2, Request("local", 4000, 5))
    worker.advance(5.0)
    kinds = [step.kind for step in steps]
    second = kinds.index("prefill", 1)
    stall = steps[second + 1].start - steps[second - 1].end
    assert kinds[second + 1] == "decode"
    assert stall == pytest.approx(Rates(TINY).prefill_s([(4000, 0)]))


def test_a_prompt_seen_before_costs_its_last_token_only_until_the_cache_is_flushed() -> None:
    begin = 0.0

    def ask(worker: Worker) -> tuple[int, float]:
        nonlocal begin
        begin += 1000.0
        request = Request("local", 512, 1, pack(range(512)))
        worker.submit(begin, request)
        worker.advance(begin + 100)
        ((at, _, _),) = worker.tokens(begin + 100)
        return request.cached, at - begin

    worker, rates = Worker(Rates(TINY), BIG), Rates(TINY)
    assert ask(worker) == pytest.approx((0, rates.prefill_s([(512, 0)])))
    assert ask(worker) == pytest.approx((511, rates.prefill_s([(1, 511)])))
    assert worker.flush() == 512
    assert ask(worker)[0] == 0
    without = Worker(Rates(TINY), replace(BIG, prefix_cache=False))
    assert [ask(without)[0], ask(without)[0]] == [0, 0]


@pytest.mark.parametrize("way", ["local", "receive"])
def test_without_memory_the_youngest_are_retracted_and_finish_later(way: Way) -> None:
    worker = Worker(Rates(TINY), Limits(capacity=1200, max_running=50, chunk=8192, reserved=1, prefix_cache=False))
    # A long answer first: the share of an answer that is held free for it falls with every step.
    requests = [Request(way, 100, 1000, peer="p", transport="tcp")]
    requests += [Request(way, 100, 400, peer="p", transport="tcp") for _ in range(4)]
    tokens: Counter[int] = Counter()
    for start, request in zip((0.0, *[100.0] * 4), requests, strict=True):
        worker.submit(start, request)
        worker.found(start, request)
    while worker.next_at < 1e6:
        now = worker.next_at
        for event in worker.advance(now):
            worker.deliver(event.at, event.request, 1000)
        tokens.update(id(request) for _, request, _ in worker.tokens(now))
    assert [tokens[id(request)] for request in requests] == [1000, 400, 400, 400, 400]
    assert worker.retracted > 0
    assert sum(request.retractions for request in requests) == worker.retracted


def test_a_decode_worker_that_is_full_lets_prefills_wait() -> None:
    worker = Worker(Rates(TINY), Limits(capacity=1000, max_running=50, chunk=8192, reserved=100, prefix_cache=False))
    requests = [Request("receive", 400, 50, peer="p", transport="tcp") for _ in range(3)]
    for request in requests:
        worker.submit(0.0, request)
        worker.found(0.0, request)
    assert [event.request for event in worker.advance(0.0)] == requests[:2]
    assert worker.pending_tokens == 400


def test_the_front_end_is_a_limit_of_its_own() -> None:
    free = replace(H200, engine=replace(H200.engine, frontend_us_per_token=0))
    load = [Prompt(64, 128)] * 600
    tied, loose = (Simulation(deployment(Rates(one), 3, 1)).closed_loop(load, 200) for one in (H200, free))
    rate = [sum(len(o.tokens) for o in out) / max(o.end for o in out) for out in (tied, loose)]
    assert rate[0] < 1e6 / 65
    assert rate[1] > 1.3 * rate[0]


def test_what_could_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 1100 tokens of KV cache, and the worker has 1000"):
        Worker(Rates(TINY), replace(BIG, capacity=1000)).submit(0.0, Request("local", 1000, 100))


def test_it_explains_what_was_measured_on_h200() -> None:
    """512 in, 128 out, concurrency 200, 1000 requests, SGLang 0.5.17: not fitted to these figures but for the front end."""
    measured = {(0, 0, 1): (8862, 2835), (1, 1, 0): (14329, 1661), (3, 1, 0): (14516, 1653), (0, 0, 4): (27883, 839)}
    for (p, d, a), (throughput, e2e_ms) in measured.items():
        outcomes = Simulation(deployment(Rates(H200), p, d, a)).closed_loop([Prompt(512, 128)] * 1000, 200)
        seen = 128000 / max(outcome.end for outcome in outcomes)
        mean = 1e3 * sum(outcome.end - outcome.sent for outcome in outcomes) / 1000
        assert seen == pytest.approx(throughput, rel=0.15), (p, d, a)
        assert mean == pytest.approx(e2e_ms, rel=0.15), (p, d, a)
