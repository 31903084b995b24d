"""The router's members, against a small router of our own that is as asynchronous as the real one."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.plans import host, plan

from pdlib import gateway
from pdlib.errors import UserError
from pdlib.gateway import Gateway, Member, difference, known_members, wanted_members
from pdlib.steps import Outcome

ROLES = ("prefill", "decode", "regular")
MEMBERS = st.builds(
    Member,
    st.sampled_from([f"http://127.0.0.{i}:30000" for i in range(4)]),
    st.sampled_from(ROLES),
    st.sampled_from([None, 8998]),
)
WANTED = st.lists(MEMBERS, unique_by=lambda m: m.url, max_size=4)
KNOWN = st.lists(st.tuples(MEMBERS, st.booleans()), max_size=5).map(
    lambda rows: [(f"id-{i}", member, healthy) for i, (member, healthy) in enumerate(rows)]
)


# ---------------------------------------------------------------- difference


@given(KNOWN, WANTED)
def test_the_change_gives_exactly_the_wanted_members(known: list[tuple[str, Member, bool]], wanted: list[Member]) -> None:
    change = difference(known, wanted)
    removed = {worker_id for worker_id, _ in change.remove}
    after = {member for worker_id, member, _ in known if worker_id not in removed} | set(change.add)
    assert after == set(wanted)
    assert set(change.add).isdisjoint({member for _, member, _ in known}), "nothing that is there is added"
    assert all(member not in wanted for _, member in change.remove), "nothing wanted is removed"
    assert difference([("x", member, True) for member in wanted], wanted) == gateway.Change()


def test_another_role_or_bootstrap_port_is_another_member() -> None:
    url = "http://127.0.0.1:30000"
    for before, after in (
        (Member(url, "prefill", 8998), Member(url, "prefill", 8999)),
        (Member(url, "prefill", 8998), Member(url, "decode")),
    ):
        assert difference([("a", before, True)], [after]) == gateway.Change((("a", before),), (after,))


def test_members_of_a_plan() -> None:
    made = plan({"n1": host(1)}, "1p1d")
    assert wanted_members(made) == [Member("http://127.0.0.1:30000", "prefill", 8998), Member("http://127.0.0.1:30001", "decode")]
    assert {m.role for m in wanted_members(plan({"n1": host(1)}, "2agg"))} == {"regular"}


# ---------------------------------------------------------------- a router


class FakeRouter:
    """A router and its workers; changes show after ``delay`` more looks, as the real one's do."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.pending: list[tuple[int, str, Any]] = []
        self.delay, self.count, self.key = 2, 0, ""
        self.linger, self.registered, self.keeps_cache = 0, list[dict[str, Any]](), True
        self.deaf_to_delete, self.sick, self.ready = False, set[str](), True
        self.calls: list[tuple[str, str]] = []
        self.answers: dict[str, tuple[int, str]] = {}
        self.generated: list[dict[str, Any]] = []
        self.cut = False
        router = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def reply(self, status: int, body: str) -> None:
                data = body.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data) + (50 if router.cut else 0)))
                self.end_headers()
                self.wfile.write(data)

            def do(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"null")
                if router.key and self.headers.get("Authorization") != f"Bearer {router.key}":
                    return self.reply(401, "no")
                with router.lock:
                    self.reply(*router.handle(self.command, self.path, body))

            do_GET = do_POST = do_DELETE = do

        self.lock = threading.Lock()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def add(self, member: Member) -> None:
        self.count += 1
        row = {"id": f"w{self.count}", "url": member.url, "worker_type": member.role, "is_healthy": True}
        if member.bootstrap_port is not None:
            row["bootstrap_port"] = member.bootstrap_port
        self.rows[str(row["id"])] = row

    def members(self) -> set[Member]:
        return {member for _, member, _ in known_members({"workers": list(self.rows.values())})}

    def _settle(self) -> None:
        self.pending = [(left - 1, what, value) for left, what, value in self.pending]
        for left, what, value in list(self.pending):
            if what == "remove" and value in self.rows and self.linger:
                self.rows[value].update(status="draining", is_healthy=False)
            if left <= 0:
                self.pending.remove((left, what, value))
                if what == "add":
                    self.add(value)
                else:
                    self.rows.pop(value, None)

    def handle(self, method: str, path: str, body: Any) -> tuple[int, str]:
        if path in self.answers:
            return self.answers[path]
        if (method, path) == ("GET", "/workers"):
            self._settle()
            rows = [{**row, "is_healthy": row["is_healthy"] and row["url"] not in self.sick} for row in self.rows.values()]
            return 200, json.dumps({"workers": rows})
        self.calls.append((method, path))
        if (method, path) == ("POST", "/workers"):
            if body["url"] in {row["url"] for row in self.rows.values()}:
                return 409, "WORKER_ALREADY_EXISTS"
            self.registered.append(body)
            self.pending.append((self.delay, "add", Member(body["url"], body["worker_type"], body.get("bootstrap_port"))))
            return 202, "{}"
        if method == "DELETE":
            if not self.deaf_to_delete:
                self.pending.append((self.delay + self.linger, "remove", path.rpartition("/")[2]))
            return 202, "{}"
        if path == "/readiness":
            return (200 if self.ready else 503), "{}"
        if path == "/health":
            return 200, "OK"
        if path == "/v1/completions":
            self.generated.append(body)
            answer: dict[str, Any] = {"usage": {"completion_tokens": body["max_tokens"]}}
            if self.keeps_cache and body.get("kv_transfer_params", {}).get("do_remote_decode"):
                answer["kv_transfer_params"] = {"do_remote_prefill": True, "remote_engine_id": "e", "remote_block_ids": [1]}
            return 200, json.dumps(answer)
        if path == "/generate":
            self.generated.append(body)
            return 200, json.dumps({"meta_info": {"completion_tokens": body["sampling_params"]["max_new_tokens"]}})
        return 404, "not found"

    def changes(self) -> list[str]:
        return [method for method, path in self.calls if path.startswith("/workers")]


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRouter]:
    monkeypatch.setattr(gateway, "STEP_S", 1.5)
    fake = FakeRouter()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


P0, P1 = Member("http://127.0.0.1:30000", "prefill", 8998), Member("http://127.0.0.1:30001", "prefill", 8999)
D0, D1 = Member("http://127.0.0.1:30002", "decode"), Member("http://127.0.0.1:30003", "decode")


def test_converge_adds_what_is_missing_and_is_then_done(router: FakeRouter) -> None:
    for member in (P0, D0):
        router.add(member)
    door = Gateway(router.url, None)
    wanted = [P0, P1, D0, D1]
    outcome = door.converge(wanted, False, True)
    assert outcome.done, outcome.message
    assert sorted(outcome.changed) == sorted(f"added {m.role} {m.url} to the router" for m in (P1, D1))
    assert router.members() == set(wanted)
    assert router.changes() == ["POST", "POST"]
    again = door.converge(wanted, False, False)
    assert again.done
    assert again.changed == []
    assert router.changes() == ["POST", "POST"]


def test_a_role_that_changed_is_removed_and_added(router: FakeRouter) -> None:
    turned = Member(P1.url, "decode")
    for member in (P0, P1):
        router.add(member)
    door, outcomes = Gateway(router.url, None), []
    for step in range(4):
        outcomes.append(door.converge([P0, turned], False, step > 0))
        if outcomes[-1].done:
            break
    assert outcomes[-1].done, outcomes[-1].message
    assert router.members() == {P0, turned}


def test_a_fresh_router_registers_its_members_by_itself_first(router: FakeRouter) -> None:
    router.pending = [(2, "add", P0), (3, "add", D0)]
    outcome = Gateway(router.url, None).converge([P0, D0], False, False)
    assert outcome.done, outcome.message
    assert router.changes() == []
    assert outcome.changed == []


def test_an_unhealthy_member_is_waited_for_by_name(router: FakeRouter) -> None:
    for member in (P0, D0):
        router.add(member)
    router.sick = {D0.url}
    outcome = Gateway(router.url, None).converge([P0, D0], False, True)
    assert not outcome.done
    assert outcome.message == f"the router counts 1 of 2 workers as healthy; waiting for decode {D0.url}"
    router.sick = set()
    assert Gateway(router.url, None).converge([P0, D0], False, True).done


def test_a_router_that_is_not_ready_is_waited_for(router: FakeRouter) -> None:
    router.add(P0)
    router.ready = False
    outcome = Gateway(router.url, None).converge([P0], False, True)
    assert not outcome.done
    assert "/readiness" in outcome.message


def test_without_a_router_it_is_waited_for(router: FakeRouter) -> None:
    router.server.shutdown()
    router.server.server_close()
    door = Gateway(router.url, None)
    outcome = door.converge([P0], False, True)
    assert (outcome.done, outcome.changed) == (False, [])
    assert f"waiting for the router at {router.url}" in outcome.message
    assert door.remove_surplus([P0], False).done, "nothing to take out of no router"
    assert door.converge([P0], True, False).done


def test_surplus_is_out_before_it_stops(router: FakeRouter) -> None:
    for member in (P0, P1, D0):
        router.add(member)
    door = Gateway(router.url, None)
    outcome = door.remove_surplus([P0, D0, D1], False)
    assert outcome.done
    assert outcome.changed == [f"removed prefill {P1.url} from the router"]
    assert router.members() == {P0, D0}
    assert router.changes() == ["DELETE"]
    assert door.remove_surplus([P0, D0, D1], False).changed == []


def test_a_router_that_does_not_let_go_is_an_error(router: FakeRouter) -> None:
    router.add(P0)
    router.deaf_to_delete = True
    with pytest.raises(UserError, match=f"the router at {router.url} does not let go"):
        Gateway(router.url, None).remove_surplus([], False)


def test_a_member_that_still_answers_is_waited_for_and_added_again_only_when_it_is_gone(router: FakeRouter) -> None:
    """The one of smg: a deleted worker drains for seconds, and the same URL is refused meanwhile."""
    for member in (P0, P1):
        router.add(member)
    router.linger = 20
    steps: list[Outcome] = []
    door, turned = Gateway(router.url, None), Member(P1.url, "decode")
    while len(steps) < 10 and not (steps and steps[-1].done):
        steps.append(door.remove_surplus([P0, turned], False))
    assert len(steps) > 1, "one step is shorter than the drain"
    assert [step.changed for step in steps] == [[f"removed prefill {P1.url} from the router"]] + [[]] * (len(steps) - 1)
    assert steps[0].message == f"the router waits for the last answers of {P1.url}"
    steps = [door.converge([P0, turned], False, True)]
    assert steps[0].done, steps[0].message
    assert router.members() == {P0, turned}
    assert router.changes() == ["DELETE", "POST"], "no POST while it drained"


def test_workers_are_registered_with_what_the_router_must_know_of_them(router: FakeRouter) -> None:
    extra = {"runtime_type": "vllm", "kv_connector": "NixlConnector", "kv_role": "kv_both"}
    outcome = Gateway(router.url, None, {"membership": "workers", "registration": extra}).converge([D0, D1], False, False)
    assert outcome.done, outcome.message
    assert router.registered == [{"url": m.url, "worker_type": "decode", **extra} for m in (D0, D1)]


def test_a_router_that_learns_its_members_at_its_start_is_only_waited_for(router: FakeRouter) -> None:
    door = Gateway(router.url, None, {"membership": "restart"})
    router.add(P0)
    assert door.remove_surplus([D0], False).changed == []
    outcome = door.converge([P0, D0], False, False)
    assert not outcome.done
    assert f"decode {D0.url}" in outcome.message
    router.add(D0)
    router.ready = False
    assert not door.converge([P0, D0], False, True).done
    router.ready = True
    assert door.converge([P0, D0], False, True).done
    router.answers = {"/workers": (404, ""), "/readiness": (404, "")}
    assert door.converge([P0, D0], False, True).done, "one without either is asked for its health"
    router.answers["/health"] = (503, "")
    assert not door.converge([P0, D0], False, True).done
    assert router.changes() == []


def test_no_role_is_left_without_a_healthy_member(router: FakeRouter) -> None:
    for member in (P0, P1, D0):
        router.add(member)
    door = Gateway(router.url, None)
    door.check_floor([P0, D0])
    router.sick = {P0.url}
    with pytest.raises(
        UserError, match=f"no healthy prefill worker would be left: the router does not count {P0.url} as healthy"
    ):
        door.check_floor([P0, D0])
    assert router.changes() == []


def test_a_worker_answers_over_each_of_its_pairs_before_clients_do(router: FakeRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan({"n1": host(1)}, "2p2d")
    for member in wanted_members(made)[:-1]:
        router.add(member)
    probed: list[tuple[set[str], list[str]]] = []

    def probe(plan: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
        probed.append(({pair["decode"] for pair in plan["pairs"]}, router.changes()))
        return [{"error": ""}]

    door = Gateway(router.url, None)
    monkeypatch.setattr(door, "probe_pairs", probe)
    outcome, rows = door.admit(made, 1.0, False)
    assert outcome.done, outcome.message
    assert rows == [{"error": ""}]
    assert probed == [({"decode-1"}, [])], "its own pairs, before the router hears of it"
    assert router.members() == set(wanted_members(made))
    assert door.admit(made, 1.0, False)[1] == [], "nobody is new"

    monkeypatch.setattr(door, "probe_pairs", lambda plan, timeout_s: [{"error": "no answer"}])
    router.rows.popitem()
    assert not door.admit(made, 1.0, False)[0].done
    assert len(router.members()) == 3, "one that does not serve gets no clients"


def test_check_mode_says_and_does_nothing(router: FakeRouter) -> None:
    router.add(P0)
    door = Gateway(router.url, None)
    assert door.remove_surplus([D0], True).changed == [f"removed prefill {P0.url} from the router"]
    outcome = door.converge([D0], True, True)
    assert outcome.done
    assert len(outcome.changed) == 2
    assert router.members() == {P0}
    assert router.calls == []


def test_the_key_is_sent_and_a_wrong_one_is_said(router: FakeRouter) -> None:
    router.key = "right"
    router.add(P0)
    assert Gateway(router.url, "right").converge([P0], False, True).done
    for key in ("wrong", None):
        with pytest.raises(UserError, match=r"refuses the key \(HTTP 401\): was it deployed with another api_key") as refused:
            Gateway(router.url, key).converge([P0], False, True)
        assert "wrong" not in str(refused.value)


def test_no_answer_a_wrong_answer_and_half_an_answer_are_status_0_or_told(router: FakeRouter) -> None:
    door = Gateway(router.url, None)
    assert door.request("GET", f"{router.url}/nothing") == (404, "not found")
    assert door.request("GET", "http://127.0.0.1:1/")[0] == 0
    router.cut = True
    status, text = door.request("GET", f"{router.url}/workers")
    assert status == 0
    assert text


def test_a_proxy_of_the_environment_is_not_asked(router: FakeRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert Gateway(router.url, None).members() == []


def test_something_else_on_the_routers_port_is_no_router(router: FakeRouter) -> None:
    for text in ("<html>", "[]", '{"workers": [{}]}', "null"):
        router.answers["/workers"] = (200, text)
        outcome = Gateway(router.url, None).converge([P0], False, True)
        assert not outcome.done
        assert "waiting for the router" in outcome.message


# ---------------------------------------------------------------- pairs


def pairs_plan(url: str, aggregated: bool = False) -> dict[str, Any]:
    roles = {"a-0": "aggregated"} if aggregated else {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode"}
    workers = [
        {"name": name, "role": role, "url": url, "ranks": [{"bootstrap_port": 8998} if role == "prefill" else {}]}
        for name, role in roles.items()
    ]
    pairs = [] if aggregated else [{"prefill": p, "decode": "decode-0"} for p in ("prefill-0", "prefill-1")]
    return {"workers": workers, "pairs": pairs}


def test_every_pair_gets_one_request_at_both_ends(router: FakeRouter) -> None:
    rows = Gateway(router.url, None).probe_pairs(pairs_plan(router.url), 10)
    assert [(r["prefill"], r["decode"], r["error"]) for r in rows] == [
        ("prefill-0", "decode-0", ""),
        ("prefill-1", "decode-0", ""),
    ]
    assert all(row["seconds"] >= 0 for row in rows)
    rooms: dict[int, int] = {}
    for body in router.generated:
        rooms[body["bootstrap_room"]] = rooms.get(body["bootstrap_room"], 0) + 1
        assert (body["bootstrap_host"], body["bootstrap_port"]) == ("127.0.0.1", 8998)
    assert list(rooms.values()) == [2, 2], "both ends of a pair share a room that no other pair has"


def test_aggregated_workers_are_asked_alone(router: FakeRouter) -> None:
    rows = Gateway(router.url, None).probe_pairs(pairs_plan(router.url, aggregated=True), 10)
    assert [(r["prefill"], r["decode"], r["error"]) for r in rows] == [("", "a-0", "")]
    assert not any(name.startswith("bootstrap") for name in router.generated[0])


def test_where_prefill_says_where_its_cache_lies_decode_is_told(router: FakeRouter) -> None:
    made = {**pairs_plan(router.url), "pair_probe": "two-step", "served_model_name": "m"}
    made["pairs"] = made["pairs"][:1]
    (row,) = Gateway(router.url, None).probe_pairs(made, 10)
    assert row["error"] == ""
    alone, asked, told = router.generated
    assert "kv_transfer_params" not in alone
    assert alone["prompt"] != asked["prompt"], "the first must leave decode no cache of the second"
    assert (asked["max_tokens"], asked["kv_transfer_params"]["do_remote_decode"]) == (1, True)
    assert (told["max_tokens"], told["prompt"], told["kv_transfer_params"]["remote_engine_id"]) == (4, asked["prompt"], "e")
    router.generated.clear()
    alone_plan = {**made, **pairs_plan(router.url, aggregated=True)}
    (row,) = Gateway(router.url, None).probe_pairs(alone_plan, 10)
    assert (row["error"], len(router.generated)) == ("", 1)


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ({"usage": {"completion_tokens": 9}}, "decode-0: answered, but not with the 4 tokens that were asked for"),
        ({"choices": []}, "decode-0: answered, but not with the 4 tokens"),
    ],
)
def test_what_decode_says_by_itself_is_told_before_the_transfer(router: FakeRouter, answer: Any, part: str) -> None:
    router.answers["/v1/completions"] = (200, json.dumps(answer))
    made = {**pairs_plan(router.url), "pair_probe": "two-step", "served_model_name": "m"}
    assert all(row["error"].startswith(part) for row in Gateway(router.url, None).probe_pairs(made, 10))


def test_a_prefill_that_keeps_no_cache_is_said(router: FakeRouter) -> None:
    router.keeps_cache = False
    made = {**pairs_plan(router.url), "pair_probe": "two-step", "served_model_name": "m"}
    for row in Gateway(router.url, None).probe_pairs(made, 10):
        assert row["error"].startswith(f"{row['prefill']}: answered without kv_transfer_params")


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ((500, "KV transfer failed"), "HTTP 500 KV transfer failed"),
        ((200, '{"meta_info": {"completion_tokens": 3}}'), "not with the 4 tokens that were asked for"),
        ((200, "[]"), "not with the 4 tokens"),
        ((200, "<html>"), "not with the 4 tokens"),
    ],
)
def test_a_pair_that_fails_is_named_with_the_reason(router: FakeRouter, answer: tuple[int, str], part: str) -> None:
    router.answers["/generate"] = answer
    rows = Gateway(router.url, None).probe_pairs(pairs_plan(router.url), 10)
    for row in rows:
        assert row["error"].startswith((f"{row['prefill']}: ", f"{row['decode']}: ")), "whichever end said so first"
        assert part in row["error"]


def test_a_worker_that_is_not_there_is_named(router: FakeRouter) -> None:
    made = pairs_plan(router.url)
    made["workers"][0]["url"] = "http://127.0.0.1:1"
    first, second = Gateway(router.url, None).probe_pairs(made, 5)
    assert first["error"].startswith("prefill-0: no answer")
    assert second["error"] == ""


def test_the_end_that_failed_is_told_without_waiting_for_the_other(router: FakeRouter) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        made = pairs_plan(router.url)
        made["workers"][2]["url"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        router.answers["/generate"] = (400, "no such room")
        rows = Gateway(router.url, None).probe_pairs(made, 20)
    assert [row["error"] for row in rows] == [f"prefill-{i}: HTTP 400 no such room" for i in (0, 1)]
    assert max(row["seconds"] for row in rows) < 15
