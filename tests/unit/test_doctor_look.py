"""What doctor.yml reads on a host, on recorded outputs and file trees; what it hears from sockets and servers of this machine."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from unit import plans

from pdlib import doctor_ask, doctor_look, doctor_reach
from pdlib.gateway import Gateway
from pdlib.processes import listeners

Json = dict[str, Any]


def answers(table: dict[str, tuple[int, str, str]]) -> doctor_look.Run:
    """A runner that knows commands by a word in them."""

    def run(argv: Sequence[str]) -> tuple[int, str, str]:
        line = " ".join(argv)
        return next((answer for word, answer in table.items() if word in line), (127, "", f"there is no {argv[0]}"))

    return run


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# -- GPUs and containers

#: nvidia-smi 580.159.04 on a host with one H200 while a process held 4 GiB (recorded); the second card is made up
SMI = (
    "0, NVIDIA H200, 143771, 138442, 00000000:00:06.0, 580.159.04\n1, NVIDIA H200, 143771, [N/A], 00000000:9A:00.0, 580.159.04\n"
)


def test_gpus_their_memory_and_who_holds_it(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "sys/bus/pci/devices/0000:00:06.0/numa_node": "-1\n",
            "sys/bus/pci/devices/0000:9a:00.0/numa_node": "1\n",
            "proc/4711/cmdline": "python\0-m\0sglang.launch_server\0",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build",
            "proc/sys/kernel/osrelease": "6.18.44-fc-v657-gpu\n",
        },
    )
    apps = "00000000:00:06.0, 4711, 4706\n00000000:9A:00.0, 99, [N/A]\n"
    seen = doctor_look.gpus(root, answers({"query-gpu": (0, SMI, ""), "compute-apps": (0, apps, "")}), {99})
    assert [(card["index"], card["free_mib"], card["numa"]) for card in seen["gpus"]] == [(0, 138442, -1), (1, 0, 1)]
    assert seen["driver"] == {"version": "580.159.04", "error": ""}
    assert seen["peermem"]["dmabuf"] is True
    assert seen["gpu_processes"] == [
        {"gpu": 0, "pid": 4711, "used_mib": 4706, "command": "python -m sglang.launch_server", "ours": False},
        {"gpu": 1, "pid": 99, "used_mib": 0, "command": "", "ours": True},
    ]


def test_a_host_whose_driver_does_not_answer_says_why(tmp_path: Path) -> None:
    failed = (9, "NVIDIA-SMI has failed because it couldn't\ncommunicate with the NVIDIA driver.\n", "")
    seen = doctor_look.gpus(tmp_path, answers({"nvidia-smi": failed}), set())
    assert seen["gpus"] == []
    assert seen["driver"]["error"] == "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    assert doctor_look.gpus(tmp_path, answers({}), set())["driver"]["error"] == "there is no nvidia-smi"


@pytest.mark.parametrize(
    ("client", "info", "files", "gpu"),
    [
        (
            "docker",
            '{"Runtimes":{"io.containerd.runc.v2":{},"nvidia":{"path":"nvidia-container-runtime"}}}',
            {},
            "runtime nvidia",
        ),
        ("docker", '{"Runtimes":{"runc":{}}}', {"usr/bin/nvidia-container-runtime-hook": ""}, "nvidia-container-runtime-hook"),
        ("docker", '{"Runtimes":{"runc":{}}}', {"etc/cdi/nvidia.yaml": "kind: nvidia.com/gpu\n"}, ""),
        ("podman", "{}", {"etc/cdi/nvidia.yaml": "kind: nvidia.com/gpu\n"}, "CDI: nvidia.yaml"),
        ("podman", '{"runtime":"nvidia"}', {"var/run/cdi/other.json": "{}"}, ""),
    ],
)
def test_what_gives_containers_gpus(tmp_path: Path, client: str, info: str, files: dict[str, str], gpu: str) -> None:
    root = write(tmp_path, files)
    assert doctor_look.container_client(client, root, answers({"info": (0, info, "")})) == {"error": "", "gpu": gpu}


def test_a_container_client_that_does_not_answer_says_why(tmp_path: Path) -> None:
    dead = answers({"docker": (1, "", "Cannot connect to the Docker daemon.\nIs it running?\n")})
    assert (
        doctor_look.container_client("docker", tmp_path, dead)["error"] == "Cannot connect to the Docker daemon. Is it running?"
    )
    assert doctor_look.container_client("podman", tmp_path, answers({}))["error"] == "there is no podman"


# -- files


def test_versions_are_read_beside_a_python_without_running_it(tmp_path: Path) -> None:
    site = "venv/lib/python3.12/site-packages"
    names = (
        "sglang-0.5.23",
        "nixl_cu13-1.5.1",
        "mooncake_transfer_engine_cuda13-0.3.14",
        "nvidia_cuda_runtime-13.0.96",
        "six-1.17",
    )
    write(tmp_path, {f"{site}/{name}.dist-info/METADATA": "" for name in names})
    assert doctor_look.packages(str(tmp_path / "venv/bin/python")) == {
        "sglang": "0.5.23", "nixl-cu13": "1.5.1", "mooncake-transfer-engine-cuda13": "0.3.14", "nvidia-cuda-runtime": "13.0.96",
    }  # fmt: skip
    assert doctor_look.packages(str(tmp_path / "none/bin/python")) == {}
    # An engine that lies in a folder of PYTHONPATH is not beside its Python, and goes before what is.
    write(tmp_path, {"own/nixl-1.5.1.dist-info/METADATA": "", "own/sglang-0.5.17.dist-info/METADATA": ""})
    found = doctor_look.packages(str(tmp_path / "venv/bin/python"), f"{tmp_path}/own:{tmp_path}/gone")
    assert (found["nixl"], found["sglang"], found["nixl-cu13"]) == ("1.5.1", "0.5.17", "1.5.1")


def test_memory_ports_and_limits(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:  1000 kB\nHugePages_Total: 9\nHugePages_Free:   7\nHugepagesize:  2048 kB\n",
            "proc/sys/net/ipv4/ip_local_port_range": "10000\t20000\n",
        },
    )
    assert doctor_look.memory(root) == {"total": 1024000, "hugepages_free": 7, "hugepage_bytes": 2097152}
    assert doctor_look.port_range(root) == [10000, 20000]
    assert doctor_look.port_range(tmp_path / "none") == [32768, 60999]
    limits = (
        "Limit                     Soft Limit           Hard Limit           Units\n"
        "Max open files            20000                20000                files\n"
        "Max locked memory         unlimited            unlimited            bytes\n"
    )
    assert doctor_look.process_limits(limits) == {"nofile": 20000, "memlock": -1}
    assert doctor_look.process_limits("") == {}


def test_a_port_that_somebody_else_holds_is_found_with_its_holder() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        units = [{"name": "pd-prefill-0", "listen": "127.0.0.1", "ports": [port]}]
        (row,) = doctor_look.taken(units)
    assert (row["unit"], row["port"]) == ("pd-prefill-0", port)
    assert "process" in row["holder"]
    assert doctor_look.taken(units) == []


# -- logs


def test_telling_lines_of_a_log_are_kept() -> None:
    log = (
        "Profiling starts. Traces will be saved to: /tmp\nUsing TCP transport (no HCA detected)\n"
        'INFO: 127.0.0.1:1 - "POST /slow_down HTTP/1.1" 200 OK\nProfiling done.\n'
        "KVTransferError(bootstrap_room=7): Failed to get kvcache from prefill instance, it might be dead\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
    )
    marks = doctor_look.log_marks(log)
    assert set(marks) == {"tcp", "slow_down", "kv", "oom"}
    assert "Failed to get kvcache" in marks["kv"]
    assert "profile" in doctor_look.log_marks(log + "Profiling starts. Traces will be saved to: /tmp\n")
    assert doctor_look.log_marks("all is well\n") == {}


def test_a_request_that_was_given_up_does_not_hide_why() -> None:
    why = "Could not fetch prefill parallel info from 10.0.0.1:8998 after 15 attempts"
    given_up = "Decode handshake failed for request with exception KVTransferError(bootstrap_room=7): Aborted by AbortReq."
    assert doctor_look.log_marks(f"{why}\n{given_up}\n{given_up}\n")["kv"] == why
    assert doctor_look.log_marks(f"{given_up}\n{why}\n")["kv"] == why
    assert doctor_look.log_marks(f"{given_up}\n")["kv"] == given_up


def test_supervisords_log_says_how_often_a_unit_was_started_anew() -> None:
    log = (
        "2026-01-01 10:00:00,000 INFO spawned: 'pd-decode-0' with pid 11\n"
        "2026-01-01 10:00:09,000 WARN exited: pd-decode-0 (exit status 1; not expected)\n"
        "2026-01-01 10:00:10,000 INFO stopped: pd-decode-0 (terminated by SIGTERM)\n"
        "2026-01-01 10:01:00,000 INFO spawned: 'pd-decode-0' with pid 12\n"
        "2026-01-01 10:01:30,000 WARN exited: pd-decode-0 (terminated by SIGKILL; not expected)\n"
        "2026-01-01 10:01:31,000 INFO spawned: 'pd-decode-0' with pid 13\n"
        "2026-01-01 10:01:40,000 WARN exited: pd-decode-01 (exit status 1; not expected)\n"
    )
    assert doctor_look.supervisord_past(log, "pd-decode-0") == (1, [12, 13])
    assert doctor_look.supervisord_past(log, "pd-prefill-0") == (0, [])


def test_systemd_says_how_often_and_whether_memory_was_the_reason() -> None:
    shown = {"NRestarts=3\nResult=oom-kill\n": (3, True), "NRestarts=1\nResult=exit-code\n": (1, False), "": (0, False)}
    for said, (count, memory) in shown.items():
        found, why = doctor_look._systemd_past("pd-decode-0", answers({"systemctl show": (0, said, "")}))
        assert (found, "want of memory" in why) == (count, memory), said


def test_a_name_that_nobody_knows_has_no_address_and_a_folder_to_be_has_room(tmp_path: Path) -> None:
    assert doctor_look._resolved("localhost") in ("127.0.0.1", "::1")
    assert doctor_look._resolved("no-such-host.invalid") == ""
    there, later = doctor_look._room(str(tmp_path)), doctor_look._room(str(tmp_path / "not" / "yet"))
    assert later["total"] == there["total"] > there["free"] >= 0
    assert later["path"] == str(tmp_path / "not" / "yet")


# -- ways between hosts


def _plan(**other: Any) -> Json:
    hosts = {name: plans.host(i) for i, name in ((1, "n1"), (2, "n2"), (3, "n3"))}
    return plans.plan(hosts, "1p1d", prefill=["n1"], decode=["n2"], router=["n3"], **other)


def test_the_ways_of_a_plan() -> None:
    plan = _plan(engine="sglang", model="org/m")
    found = {
        (way["from"], way["to"], way["port"]): way["what"] for way in doctor_reach.ways(plan, ["n2"], {"n1": [10000, 20000]})
    }
    assert found["n2", "n1", 8998] == "bootstrap of prefill-0"
    assert found["n3", "n1", 30000] == "HTTP of prefill-0"
    assert found["n3", "n2", 30000] == "HTTP of decode-0"
    assert found["n2", "n3", 8000] == "the router"
    assert found["n2", "n1", 30000] == "HTTP of prefill-0 (metrics)"
    assert [key for key, what in found.items() if "ZMQ" in what] == [("n2", "n1", 12100), ("n2", "n1", 18300)]
    # of several clients the first asks the workers, and all come to it and to the router
    meet = {"address": "127.0.0.4", "port": 8890}
    several = doctor_reach.ways(plan, ["n4", "n5", "n6"], {}, meet)
    assert {(way["to"], way["port"]) for way in several if way["from"] == "n4"} == {("n1", 30000), ("n2", 30000), ("n3", 8000)}
    for other in ("n5", "n6"):
        assert {(way["to"], way["address"], way["port"]) for way in several if way["from"] == other} == {
            ("n3", "127.0.0.3", 8000), ("n4", "127.0.0.4", 8890)
        }  # fmt: skip
    # nothing within a host, and nothing for a plan that is not there
    assert not [way for way in found if way[0] == way[1]]
    assert doctor_reach.ways({}) == []


def test_mooncake_needs_its_own_ports() -> None:
    ways = doctor_reach.ways(_plan(engine="sglang", model="org/m", transfer_backend="mooncake_tcp"))
    assert [(way["from"], way["port"]) for way in ways if "Mooncake" in way["what"]] == [("n1", 16207), ("n2", 16207)]


def test_vllm_needs_the_side_channels_of_both_ends() -> None:
    hosts = {name: plans.host(i) for i, name in ((1, "n1"), (2, "n2"))}
    plan = plans.plan(hosts, "1p1d", prefill=["n1"], decode=["n2"], engine="vllm", model="org/m", router="vllm-router")
    ways = {(way["from"], way["to"], way["port"]): way["what"] for way in doctor_reach.ways(plan)}
    assert ways["n2", "n1", 5600] == "KV side channel of prefill-0"
    assert ways["n1", "n2", 5600] == "KV side channel of decode-0"


def test_ranks_of_a_worker_meet_at_the_first() -> None:
    hosts = {name: plans.host(i) for i, name in ((1, "n1"), (2, "n2"), (3, "n3"))}
    many = {"prefill_nodes_per_worker": 2, "prefill_tensor_parallel_size": 8}
    plan = plans.plan(hosts, "1p1d", prefill=["n1", "n2"], decode=["n3"], engine="sglang", model="org/m", **many)
    ways = {(way["from"], way["to"], way["port"]): way["what"] for way in doctor_reach.ways(plan)}
    assert ways["n2", "n1", 5757] == "rendezvous of prefill-0"
    assert ("n3", "n2", 8998) not in ways


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_port_in_use_is_tried_as_it_is_and_a_free_one_gets_a_listener() -> None:
    way = {"from": "n1", "to": "n2", "address": "127.0.0.2", "port": 30000, "what": "HTTP"}
    other = {**way, "port": 8998}
    jobs = doctor_reach.jobs([way, other], {"n1": [], "n2": [("0.0.0.0", 30000)]})
    assert [(row["port"], row["direct"]) for row in jobs["n1"]["connect"]] == [(30000, True), (8998, False)]
    assert jobs["n2"]["listen"] == {"127.0.0.2 8998": ["n1"]}
    # a host that was not examined opens no listener
    assert doctor_reach.jobs([way, other], {"n1": []})["n1"]["connect"] == []


def both(jobs: dict[str, Json], window_s: float) -> dict[str, list[Json]]:
    """Run the jobs of two hosts at the same time."""
    rows: dict[str, list[Json]] = {}
    threads = [
        threading.Thread(target=lambda n=name, j=job: rows.update({n: doctor_reach.reach(j, window_s)}))
        for name, job in jobs.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows


def test_hosts_hear_each_other_and_end_as_soon_as_all_have_come() -> None:
    ports = [free_port() for _ in range(3)]
    ways = [{"from": "n1", "to": "n2", "address": "127.0.0.2", "port": port, "what": "x"} for port in ports]
    ways += [{"from": "n2", "to": "n1", "address": "127.0.0.1", "port": ports[0], "what": "x"}]
    started = time.monotonic()
    rows = doctor_reach.heard(both(doctor_reach.jobs(ways, {"n1": [], "n2": []}), 60))
    assert time.monotonic() - started < 30
    assert [row["state"] for listed in rows.values() for row in listed] == ["open"] * 4
    assert not {port for _, port, _ in listeners()} & set(ports)


def test_a_port_where_nothing_can_listen_is_not_blamed_on_the_way() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.2", 0))
        # bound and not listening: connections are refused, and a listener cannot be opened either
        way = {"from": "n1", "to": "n2", "address": "127.0.0.2", "port": sock.getsockname()[1], "what": "x"}
        rows = both(doctor_reach.jobs([way], {"n1": [], "n2": []}), 1)
    (row,) = doctor_reach.heard(rows)["n1"]
    assert (row["state"], row["why"]) == ("unheard", "n2 cannot listen there: Address already in use")


def test_a_host_that_came_when_the_other_was_gone_is_not_blamed_on_the_way() -> None:
    way = {"from": "n1", "to": "n2", "address": "127.0.0.2", "port": free_port(), "what": "x"}
    jobs = doctor_reach.jobs([way], {"n1": [], "n2": []})
    began = time.monotonic()
    rows = {"n2": doctor_reach.reach(jobs["n2"], 0.2)}
    while doctor_reach.reach(jobs["n1"], 0.0)[0]["state"] == "open":
        time.sleep(0.1)  # its thread may still take one that comes
    gone = time.monotonic()
    rows["n1"] = doctor_reach.reach(jobs["n1"], 0.2)
    assert rows["n1"][0]["state"] == "refused"
    (late,) = doctor_reach.heard(rows, {"n2": (began, gone), "n1": (gone, time.monotonic())})["n1"]
    assert (late["state"], late["why"].startswith("n2 and n1 were examined one after the other")) == ("unheard", True)
    # at the same time it is a refusal, and so is one of a service that is there
    at_once = {"n2": (0.0, 5.0), "n1": (4.9, 9.0)}
    assert doctor_reach.heard(rows, at_once)["n1"][0]["state"] == "refused"
    rows["n1"] = [{**row, "direct": True} for row in rows["n1"]]
    assert doctor_reach.heard(rows, {"n2": (0.0, 1.0), "n1": (2.0, 3.0)})["n1"][0]["state"] == "refused"


def test_a_refusal_and_a_silence_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    way = {"from": "n1", "to": "n2", "address": "127.0.0.2", "port": free_port(), "what": "x", "direct": True}
    (row,) = doctor_reach.reach({"name": "n1", "connect": [way], "listen": {}}, 1)
    assert row["state"] == "refused"
    assert doctor_reach.heard({"n1": [row]})["n1"][0]["state"] == "refused"
    # no listener was ever there, as its host did not run
    assert doctor_reach.heard({"n1": [{**row, "direct": False}]})["n1"][0]["state"] == "unheard"

    def silence(*_: Any, **__: Any) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silence)
    (row,) = doctor_reach.reach({"name": "n1", "connect": [way], "listen": {}}, 1)
    assert row["state"] == "dropped"
    assert "no answer" in row["why"]


# -- router and workers


@contextmanager
def server(pages: dict[str, tuple[int, str]]) -> Iterator[str]:
    """A server of fixed pages; a page that ends with `...` is sent line by line."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = pages.get(self.path, (404, ""))
            if self.command == "POST":
                self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            for line in text.splitlines(keepends=True):
                self.wfile.write(line.encode())
                if line.startswith("data:"):
                    self.wfile.flush()
                    time.sleep(0.02)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()


METRICS = """# TYPE sglang:num_transfer_failed_reqs_total counter
sglang:num_transfer_failed_reqs_total{tp_rank="0"} 2.0
sglang:num_transfer_failed_reqs_total{tp_rank="1"} 1.0
sglang:num_bootstrap_failed_reqs_total 4
vllm:nixl_num_failed_transfers_total{engine="0"} 5.0
sglang:kv_transfer_total_mb_count 100
sglang:num_requests_total 7
"""


def test_failed_transfers_are_counted_whatever_the_engine_calls_them() -> None:
    assert doctor_ask.failures(METRICS) == {
        "sglang:num_transfer_failed_reqs_total": 3.0,
        "sglang:num_bootstrap_failed_reqs_total": 4.0,
        "vllm:nixl_num_failed_transfers_total": 5.0,
    }


def event(text: str) -> str:
    return "data: " + json.dumps({"choices": [{"text": text, "finish_reason": None}]}) + "\n"


def test_a_stream_is_timed_event_by_event() -> None:
    good = event("one") + event("two") + "data: [DONE]\n"
    with server({"/v1/completions": (200, good)}) as url:
        said = doctor_ask.stream(Gateway(url, None), "m", 20)
    assert said["error"] == ""
    assert said["empty_first_s"] is None
    assert len(said["tokens_s"]) == 2
    assert said["tokens_s"][0] < said["tokens_s"][1] <= said["end_s"]
    with server({"/v1/completions": (200, event("") + good)}) as url:
        said = doctor_ask.stream(Gateway(url, None), "m", 20)
    assert said["empty_first_s"] < said["tokens_s"][0]
    with server({"/v1/completions": (503, "no workers")}) as url:
        assert doctor_ask.stream(Gateway(url, None), "m", 20)["error"] == "HTTP 503 no workers"
    with server({"/v1/completions": (200, "data: [DONE]\n")}) as url:
        assert doctor_ask.stream(Gateway(url, None), "m", 20)["error"] == "it ended without a token"
    assert "refused" in doctor_ask.stream(Gateway(f"http://127.0.0.1:{free_port()}", None), "m", 5)["error"]


def test_a_stream_in_one_piece_is_asked_for_again() -> None:
    late = {"error": "", "tokens_s": [0.399, 0.4], "empty_first_s": None, "end_s": 0.4}
    good = {**late, "tokens_s": [0.1, 0.4]}
    for answers_, wanted, left in (([late, good], good, 0), ([late, late], late, 0), ([good, late], good, 1)):
        queue = list(answers_)
        assert doctor_ask._twice(partial(queue.pop, 0)) == wanted
        assert len(queue) == left
    assert doctor_ask.spread({**late, "tokens_s": []}) == 0


def test_router_and_workers_are_asked_and_a_dead_worker_is_not_waited_for() -> None:
    plan = plans.plan({"n1": plans.host(1)}, "1p1d")
    workers = [{"url": "http://w1", "worker_type": "prefill", "is_healthy": True, "bootstrap_port": 8998, "id": "x", "load": 0}]
    router = {"/readiness": (503, '{"status": "not ready"}'), "/workers": (200, json.dumps({"workers": workers}))}
    info = {"version": "0.5.23", "page_size": 16, "unknown": 1}
    worker = {"/ready": (200, ""), "/server_info": (200, json.dumps(info)), "/metrics": (200, METRICS)}
    with server(router) as front, server(worker) as alive:
        plan["router"]["url"] = front
        prefill, decode = plan["workers"]
        prefill["url"], prefill["ranks"][0]["health_url"] = alive, f"{alive}/ready"
        prefill["ranks"][0]["bootstrap_port"] = free_port()
        dead = free_port()
        decode["url"], decode["ranks"][0]["health_url"] = f"http://127.0.0.1:{dead}", f"http://127.0.0.1:{dead}/ready"
        said = doctor_ask.ask(plan, None, "n1", True, 20)
    assert said["router"]["ready"] == 503
    assert said["router"]["workers"] == [{key: workers[0][key] for key in ("url", "worker_type", "is_healthy", "bootstrap_port")}]
    first, second = said["workers"]["prefill-0"], said["workers"]["decode-0"]
    assert first["info"] == {"version": "0.5.23", "page_size": 16}
    assert first["failures"]["sglang:num_bootstrap_failed_reqs_total"] == 4
    assert "refused" in first["bootstrap_error"]
    assert (second["health"], "refused" in second["error"]) == (0, True)
    assert said["pairs"] == [
        {"prefill": "prefill-0", "decode": "decode-0", "seconds": 0.0, "error": "not tried: decode-0 not healthy"}
    ]
    assert said["stream"] == {}


def test_a_router_that_refuses_the_key_says_so() -> None:
    plan = plans.plan({"n1": plans.host(1)}, "agg")
    with server({"/readiness": (200, ""), "/workers": (401, "Unauthorized")}) as front:
        plan["router"]["url"] = front
        plan["workers"][0]["url"] = plan["workers"][0]["ranks"][0]["health_url"] = f"http://127.0.0.1:{free_port()}"
        assert doctor_ask.ask(plan, "k", "n1", False, 5)["router"] == {"ready": 401, "error": "Unauthorized", "workers": None}
