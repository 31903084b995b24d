"""Engines in containers and in environments that are there: what a plan entry becomes, and what a host does about it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.plans import Json, host, inputs, plan

from pdlib import containers, images, provision, runtimes, units
from pdlib.errors import UserError
from pdlib.managers import Systemd
from pdlib.plan import Planner
from pdlib.steps import Outcome

DIGEST = "sha256:" + "0a" * 32
IMAGE = f"lmsysorg/sglang:v0.5.23@{DIGEST}"
NAMES = st.from_regex(r"([a-z0-9.-]{1,8}(:[0-9]{2,4})?/)?[a-z0-9]{1,6}(/[a-z0-9]{1,6})?", fullmatch=True).filter(
    lambda name: not name.startswith(("-", ".")) and ".." not in name and "-." not in name
)
TAGS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,10}", fullmatch=True).filter(lambda tag: tag != "latest")

# ---------------------------------------------------------------- which image


@given(NAMES, TAGS)
def test_only_a_tag_with_a_digest_says_which_image_it_is(name: str, tag: str) -> None:
    assert runtimes.check_image(f"{name}:{tag}@{DIGEST}", "n1", "docker", archive=False) == f"{name}:{tag}@{DIGEST}"
    for loose in (f"{name}:{tag}", f"{name}@{DIGEST}", name, f"{name}:latest@{DIGEST}"):
        with pytest.raises(UserError, match=r"host n1: engine_image="):
            runtimes.check_image(loose, "n1", "docker", archive=False)


@given(NAMES, TAGS)
def test_an_archive_pins_the_image_so_that_the_tag_is_enough(name: str, tag: str) -> None:
    for given_ in (f"{name}:{tag}", f"{name}:{tag}@{DIGEST}"):
        assert runtimes.check_image(given_, "n1", "podman", archive=True) == f"{name}:{tag}"


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        (None, ["runtime is docker", "engine_image must name"]),
        ("", ["engine_image must name"]),
        ("lmsysorg/sglang", ["has no tag", "tag and digest"]),
        ("lmsysorg/sglang:latest", ["the tag latest moves"]),
        ("lmsysorg/sglang:v1", ["has no digest", "imagetools inspect lmsysorg/sglang:v1"]),
        (f"lmsysorg/sglang:v1@{DIGEST[:-1]}", ["not an image's name"]),
        ("Not An Image", ["not an image's name"]),
    ],
)
def test_a_wrong_image_is_refused_by_host_with_a_right_one(image: str | None, parts: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        plan({"n1": host(1, engine_image=image, runtime="docker", gpus=2)}, "agg", engine="sglang", model="m")
    for part in ["host n1", *parts]:
        assert part in str(refused.value)


# ---------------------------------------------------------------- the command line


def ranks(made: Json) -> list[Json]:
    return [rank for worker in made["workers"] for rank in worker["ranks"]]


def sglang(runtime: str, ratio: str = "1p1d", **own: Any) -> Json:
    """A plan on one host with GPUs 4 to 7, two a worker."""
    settings: Json = {"runtime": runtime, "service_manager": "systemd", **({"engine_image": IMAGE} if runtime != "venv" else {})}
    settings.update({"rdma_fabric": "roce", "rdma_devices": ["mlx5_0"], "tcp_device": "eth0", "gpus": [4, 5, 6, 7]})
    settings.update({"address": "127.0.0.1", **own})
    return plan({"n1": settings}, ratio, engine="sglang", model="Qwen/Qwen2.5-3B-Instruct", tensor_parallel_size=2)


def values(command: list[str], flag: str) -> list[str]:
    return [command[i + 1] for i, item in enumerate(command) if item == flag]


@pytest.mark.parametrize("runtime", runtimes.CONTAINERS)
def test_only_the_command_differs_from_a_virtualenv(runtime: str) -> None:
    for inside, outside in zip(ranks(sglang(runtime)), ranks(sglang("venv")), strict=True):
        assert inside["argv"][1:] == outside["argv"][1:]
        assert inside["argv"][0] == "python3"
        assert {k: inside[k] for k in ("port", "gpus", "unit", "url", "health_url") if k in inside} == {
            k: outside[k] for k in ("port", "gpus", "unit", "url", "health_url") if k in outside
        }
        command = inside["container"]["argv"]
        place = command.index(IMAGE)
        assert command[:2] == [runtime, "run"]
        assert [command[command.index("--entrypoint") + 1], *command[place + 1 :]] == inside["argv"]


@pytest.mark.parametrize("runtime", runtimes.CONTAINERS)
def test_a_container_sees_all_lent_gpus_and_its_worker_counts_them_from_zero(runtime: str) -> None:
    # cuda_ipc between prefill and decode needs both ends' GPUs, one process and one IPC namespace
    seen = []
    for rank in ranks(sglang(runtime)):
        command = rank["container"]["argv"]
        if runtime == "docker":
            assert values(command, "--gpus") == ['"device=4,5,6,7"']
        else:
            assert [v for v in values(command, "--device") if "gpu" in v] == [f"nvidia.com/gpu={n}" for n in (4, 5, 6, 7)]
        assert [values(command, flag) for flag in ("--pid", "--ipc", "--network")] == [["host"]] * 3
        assert "--shm-size" not in command
        visible = [int(n) for n in rank["env"]["CUDA_VISIBLE_DEVICES"].split(",")]
        assert [(4, 5, 6, 7)[n] for n in visible] == rank["gpus"]
        seen += visible
    assert sorted(seen) == [0, 1, 2, 3]


def test_rdma_limits_and_shared_memory() -> None:
    command = ranks(sglang("docker"))[0]["container"]["argv"]
    assert values(command, "--device") == ["/dev/infiniband"]
    assert values(command, "--cap-add") == ["IPC_LOCK"]
    assert values(command, "--ulimit") == ["memlock=-1:-1", "nofile=1048576:1048576"]
    without = ranks(sglang("docker", rdma_fabric="none", rdma_devices=None))[0]["container"]["argv"]
    assert "/dev/infiniband" not in without
    # podman refuses a size together with the host's IPC, and docker ignores it
    own = ranks(sglang("podman", "agg", engine_shm_size="32g"))[0]["container"]["argv"]
    assert values(own, "--shm-size") == ["32g"]
    assert "--ipc" not in own
    # without root podman may not raise limits
    assert "--ulimit" not in ranks(sglang("podman", service_manager="supervisord"))[0]["container"]["argv"]
    assert ranks(sglang("podman", engine_container_args=["--device", "/dev/gdrdrv"]))[0]["container"]["argv"].count("/dev/gdrdrv")


def test_shared_memory_of_its_own_is_refused_where_the_kv_cache_needs_the_hosts() -> None:
    said = r"host n1: engine_shm_size=32g takes containers out of .* no CUDA IPC joins prefill-0 and decode-0: leave it out"
    with pytest.raises(UserError, match=said):
        sglang("docker", engine_shm_size="32g")
    assert ranks(sglang("venv", engine_shm_size="32g")), "it says nothing to processes outside containers"


def test_values_of_the_environment_stay_out_of_the_command_line() -> None:
    rank = ranks(sglang("docker", engine_env={"HF_TOKEN": "s3cret", "LD_LIBRARY_PATH": "/x/lib", "A": "up\nside"}))[0]
    command = rank["container"]["argv"]
    assert not [item for item in command if "s3cret" in item or "side" in item]
    assert {"HF_TOKEN", "A", "LD_LIBRARY_PATH=/x/lib"} <= set(values(command, "--env"))
    (unit, *_) = units.host_units(sglang("docker", engine_env={"HF_TOKEN": "s3cret", "LD_LIBRARY_PATH": "/x/lib"}), "n1")
    # what the client itself would load from is not in its environment
    assert unit["env"]["HF_TOKEN"] == "s3cret"
    assert "LD_LIBRARY_PATH" not in unit["env"]


def test_the_hubs_token_is_read_in_a_container() -> None:
    rank = ranks(sglang("docker", model="Org/m", hf_token="s3cret"))[0]
    assert "s3cret" not in str(rank)
    assert "HF_TOKEN_PATH" in values(rank["container"]["argv"], "--env")
    mounts = values(rank["container"]["argv"], "--mount")
    assert "type=bind,source=/var/lib/pd/secrets,target=/var/lib/pd/secrets,readonly" in mounts
    # without a key there is no launcher, whose folder the client would miss
    assert not [mount for mount in mounts if "/bin," in mount]


def test_what_outlives_a_container_is_mounted() -> None:
    hub = ranks(sglang("docker", model_dir="/srv/models", cache_dir="/srv/cache"))[0]
    mounts = values(hub["container"]["argv"], "--mount")
    assert hub["env"]["HF_HOME"] == "/srv/models/huggingface"
    for folder in ("/srv/models/huggingface", "/srv/cache", "/var/lib/pd/run/pd-prefill-0"):
        assert f"type=bind,source={folder},target={folder}" in mounts
    assert {"/srv/models/huggingface", "/srv/cache"} <= set(hub["container"]["folders"])
    made = plan({"n1": host(1, runtime="docker", engine_image=IMAGE)}, "agg", engine="sglang", model="/srv/m/Qwen", api_key="k")
    mounts = values(ranks(made)[0]["container"]["argv"], "--mount")
    assert "type=bind,source=/srv/m/Qwen,target=/srv/m/Qwen,readonly" in mounts
    assert "type=bind,source=/var/lib/pd/secrets,target=/var/lib/pd/secrets,readonly" in mounts
    assert "HF_HOME" not in ranks(made)[0]["env"]


def test_kinds_of_machines_in_one_play_have_an_image_each() -> None:
    arm, x86 = f"lmsysorg/sglang:v0.5.23-arm64@{DIGEST}", f"lmsysorg/sglang:v0.5.23@sha256:{'1b' * 32}"
    hosts = {
        "gh200": host(1, 1, runtime="docker", engine_image=arm),
        "a100": host(2, 1, runtime="podman", engine_image=x86),
        "h200": host(3, 1, runtime="venv"),
    }
    made = plan(hosts, "1p2d", engine="sglang", model="m", prefill=["gh200"], decode=["a100", "h200"])
    images_of = {rank["host"]: rank.get("container", {}).get("image") for rank in ranks(made)}
    assert images_of == {"gh200": arm, "a100": x86, "h200": None}
    assert [row["name"] for row in made["hosts"]["a100"]["installs"]] == ["supervisor"]
    assert "runtime" not in made["hosts"]["h200"]


def test_another_image_restarts_the_worker() -> None:
    (before, _), (after, _) = (
        units.host_units(sglang("docker", "agg", engine_image=i), "n1") for i in (IMAGE, IMAGE[:-2] + "ff")
    )
    assert units.identity(before) != units.identity(after)


# ---------------------------------------------------------------- units


@pytest.mark.parametrize("runtime", runtimes.CONTAINERS)
def test_a_unit_ends_the_container_that_its_client_leaves_behind(runtime: str) -> None:
    made = sglang(runtime)
    files = units.rendered_files(made, "n1")
    name = runtimes.container_name("pd-prefill-0", "/var/lib/pd")
    service, script = files["pd-prefill-0.service"], files["pd-prefill-0.sh"]
    remove = f"{runtime} rm --force {name}"
    assert [line for line in service.splitlines() if line.endswith(remove)] == [
        f"ExecStartPre=-{remove}",
        f"ExecStopPost=-{remove}",
    ]
    assert service.index("ExecStartPre=-" + runtime) < service.index(f"ExecStart={runtime}")
    assert script.index(remove) < script.index(f"exec {runtime} run")
    assert "User=root" in service
    assert ("NoNewPrivileges" in service) == (runtime == "docker")
    assert "User=pd\n" in files["pd-router.service"]
    if shutil.which("systemd-analyze") and shutil.which(runtime):
        text = {Path(f"/x/{n}"): (body, 0) for n, body in files.items() if n.endswith((".service", ".target"))}
        own = {path: row for path, row in text.items() if "router" not in path.name}
        Systemd("/var/lib/pd", "/opt/pd", "1p1d").check(own)


def test_two_deployments_on_a_host_have_containers_of_their_own() -> None:
    assert runtimes.container_name("pd-decode-0", "/a") != runtimes.container_name("pd-decode-0", "/b")


# ---------------------------------------------------------------- on the host, with a client that keeps its books in files

CLIENT = """#!{python}
import json, os, sys, time
home = os.environ["FAKE"]
args = sys.argv[1:]
def book(): return json.load(open(home + "/book"))
def keep(value): json.dump(value, open(home + "/book", "w"))
with open(home + "/calls", "a") as file: file.write(" ".join(args) + "\\n")
if os.path.exists(home + "/down"): sys.exit("Cannot connect to the daemon")
if args[0] == "ps":
    label = args[args.index("--filter") + 1].removeprefix("label=pd=")
    print("\\n".join(n for n, l in book()["containers"].items() if l == label))
elif args[0] == "rm":
    state = book(); state["containers"].pop(args[-1]); keep(state)
elif args[0] == "info": print(home)
elif args[:2] == ["image", "inspect"]:
    found = book()["images"].get(args[-1])
    sys.exit("no such image") if not found else print(*found)
elif args[0] in ("pull", "load"):
    print("1234: Pulling fs layer\\n5678: Pulling fs layer\\n1234: Pull complete", flush=True)
    time.sleep(float(os.environ.get("FAKE_S", "0")))
    state = book()
    state["images"].update(state["remote"])
    keep(state)
    print("Loaded image: " + next(iter(state["remote"]), "nothing"))
"""
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]


class Fake:
    """A docker that does nothing but remember."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.state, self.install = str(folder / "state"), str(folder / "install")

    def book(self, **value: Any) -> None:
        (self.folder / "book").write_text(json.dumps({"containers": {}, "images": {}, "remote": {}, **value}))

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def home(self, **own: Any) -> Json:
        record = runtimes.image_record(self.install, "e/x:1")
        return {"kind": "docker", "image": "e/x:1", "archive": "", "gpus": False, "record": record, "min_free_gb": 0, **own}

    def step(self, home: Json | None = None, *, archive: Json | None = None, path: str = "", check: bool = False) -> Outcome:
        return images.step(home or self.home(), self.state, self.install, "", archive, path, check, False)

    def finish(self, **options: Any) -> Outcome:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            outcome = self.step(**options)
            if outcome.done:
                return outcome
        raise AssertionError("it never ended")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("docker", "podman"):
        (bin_ / name).write_text(CLIENT.format(python=sys.executable))
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    made = Fake(tmp_path)
    Path(made.state).mkdir()
    (Path(made.state) / ".pd").touch()
    made.book()
    return made


def test_containers_of_a_state_directory_are_ended_and_no_others(fake: Fake) -> None:
    ours, stray = (runtimes.container_name(name, fake.state) for name in ("pd-decode-0", "pd-decode-9"))
    other = runtimes.container_name("pd-decode-0", "/elsewhere")
    fake.book(containers={ours: fake.state, stray: fake.state, other: "/elsewhere"})
    assert containers.remove(fake.state, ["pd-decode-0"]) == [], "no unit of ours ever used a client: none is asked"
    assert fake.calls() == []
    containers.note(fake.state, ["docker"])
    assert containers.remove(fake.state, ["pd-decode-0", "pd-prefill-0"]) == [ours]
    assert containers.ours(fake.state) == {stray: "docker"}
    assert containers.end(containers.ours(fake.state)) == [stray]
    assert json.loads((fake.folder / "book").read_text())["containers"] == {other: "/elsewhere"}


def test_a_client_that_gives_no_answer_is_not_taken_for_no_container(fake: Fake) -> None:
    containers.note(fake.state, ["docker"])
    (fake.folder / "down").touch()
    with pytest.raises(UserError, match="Cannot connect"):
        containers.ours(fake.state)


def test_an_image_is_pulled_once(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.book(remote={"e/x:1": ["sha256:11", MACHINE]})
    monkeypatch.setattr(images, "STEP_S", 0.2)
    monkeypatch.setenv("FAKE_S", "3")
    foretold = fake.step(check=True)
    assert (foretold.done, foretold.changed) == (True, ["would pull e/x:1"])
    assert not [call for call in fake.calls() if call.startswith("pull")]
    first = fake.step()
    assert not first.done
    said = {first.message}
    while not (outcome := fake.step()).done:
        said.add(outcome.message)
    assert any("1 of 2 layers" in line for line in said)
    assert outcome.changed == ["pulled e/x:1"]
    assert fake.step().changed == []
    assert len([call for call in fake.calls() if call.startswith("pull")]) == 1


def test_an_image_of_another_machine_is_refused(fake: Fake) -> None:
    other = {"amd64": "arm64", "arm64": "amd64"}[MACHINE]
    fake.book(images={"e/x:1": ["sha256:11", other]})
    with pytest.raises(UserError, match=r"made for .*, and the host is .*set engine_image in the host_vars"):
        fake.step()


def test_an_image_that_does_not_come_is_told_with_the_clients_words(fake: Fake) -> None:
    with pytest.raises(UserError, match=r"docker did not pull e/x:1. It said:\n(.|\n)*Pull complete"):
        fake.finish()


def test_nothing_is_fetched_where_the_disk_is_too_full_or_the_client_not_ours(fake: Fake) -> None:
    with pytest.raises(UserError, match="GB are free, and engine_image_min_free_gb is 1e"):
        fake.step(fake.home(min_free_gb=1e9))
    (fake.folder / "down").touch()
    with pytest.raises(UserError, match="cannot use docker on the host"):
        fake.step()
    with pytest.raises(UserError, match="there is no nerdctl on the host"):
        fake.step(fake.home(kind="nerdctl"))
    assert not [call for call in fake.calls() if call.startswith("pull")]


def test_an_archive_is_asked_for_loaded_and_pins_the_image(fake: Fake) -> None:
    one, two = {"sha256": "aa", "size": 1}, {"sha256": "bb", "size": 1}
    fake.book(remote={"e/x:1": ["sha256:11", MACHINE]})
    assert fake.step(archive=one).lacks == ["e/x:1"]
    assert fake.finish(archive=one, path="/x.tar").changed == ["loaded e/x:1"]
    assert fake.step(archive=one).changed == []
    # the tag was moved on the host, or the controller has another archive
    fake.book(images={"e/x:1": ["sha256:22", MACHINE]})
    assert fake.step(archive=one).lacks == ["e/x:1"]
    fake.book(images={"e/x:1": ["sha256:11", MACHINE]})
    assert fake.step(archive=one).done
    assert fake.step(archive=two).lacks == ["e/x:1"]


def test_an_archive_of_another_name_is_told_with_its_name(fake: Fake) -> None:
    fake.book(remote={"e/other:1": ["sha256:11", MACHINE]})
    with pytest.raises(UserError, match="not in the archive: Loaded image: e/other:1"):
        fake.finish(archive={"sha256": "aa", "size": 1}, path="/x.tar")


# ---------------------------------------------------------------- engines that are there


@pytest.mark.parametrize(
    ("found", "fits"),
    [("0.5.23", True), ("0.5.23.post1", True), ("0.5.23+cu130", True), ("0.5.23.dev7+gabc", True), ("0.5.2", False),
     ("0.5.230", False), ("0.5.23rc1", False), ("10.5.23", False), ("unknown", False)],
)  # fmt: skip
def test_which_versions_are_the_wanted_release(found: str, fits: bool) -> None:
    assert images.same_release(found, "0.5.23") is fits


def existing(tmp_path: Path, **own: Any) -> None:
    home = {"kind": "existing", "python": sys.executable, "package": "pd_toy_engine", "version": "1.2.3", "env": {}, **own}
    images.step(home, str(tmp_path / "s"), str(tmp_path / "i"), "", None, "", False, False)


def test_an_engine_that_is_there_is_asked_for_its_version(tmp_path: Path) -> None:
    checkout = tmp_path / "src" / "pd_toy_engine"
    checkout.mkdir(parents=True)
    (checkout / "__init__.py").write_text("raise SystemExit('an engine takes seconds to import')\n")
    (checkout / "version.py").write_text('__version__ = "1.2.3"\n')
    env = {"PYTHONPATH": str(checkout.parent)}
    existing(tmp_path, env=env)
    with pytest.raises(UserError, match=r"has pd_toy_engine 1\.2\.3, and engine_version is 1\.2\.4"):
        existing(tmp_path, env=env, version="1.2.4")
    with pytest.raises(UserError, match="has no pd_toy_engine"):
        existing(tmp_path)
    with pytest.raises(UserError, match="there is no such Python"):
        existing(tmp_path, python=str(tmp_path / "python"))
    (tmp_path / "python").write_text("no program")
    with pytest.raises(UserError, match="does not run"):
        existing(tmp_path, python=str(tmp_path / "python"))


def test_an_environment_may_be_named_by_its_folder() -> None:
    settings = {"runtime": "existing", "engine_python": "/opt/conda/envs/sglang-pd/", "install_dir": "/opt/pd"}
    assert provision.engine_python("n1", settings, "/venv") == "/opt/conda/envs/sglang-pd/bin/python"
    assert provision.engine_python("n1", {**settings, "engine_python": "/usr/bin/python3.12"}, "/venv") == "/usr/bin/python3.12"


@pytest.mark.parametrize(
    ("version", "others", "part"),
    [
        ("3.9.2", ["/usr/bin/python3.12", "/usr/bin/python3.11"], "set venv_python=/usr/bin/python3.12"),
        ("3.14.0", [], "install one"),
    ],
)
def test_a_python_that_virtualenvs_cannot_be_made_with_is_refused(version: str, others: list[str], part: str) -> None:
    found = {"n1": {"python": {"path": "/usr/bin/python3", "version": version, "others": others}}}
    with pytest.raises(UserError) as refused:
        plan({"n1": host(1)}, "agg", discovered=found)
    for wanted in ("host n1", f"Python {version}", "3.11 to 3.13", part):
        assert wanted in str(refused.value)


def test_a_container_host_needs_no_python_of_its_own_but_for_the_load_generator() -> None:
    old = {"python": {"path": "/usr/bin/python3", "version": "3.8.10", "others": []}}
    hosts = {"n1": host(1), "n2": host(2, runtime="docker", engine_image=IMAGE, service_manager="systemd")}
    options: Json = {"engine": "sglang", "model": "m", "prefill": ["n2"], "decode": ["n2"], "router": ["n1"]}
    planner = Planner(inputs(hosts, "agg", **options, clients=["n2"], discovered={"n2": old}))
    assert planner.make()["hosts"]["n2"]["installs"] == []
    with pytest.raises(UserError, match=r"host n2: /usr/bin/python3 is Python 3\.8\.10, .*: install one"):
        planner.check_python("n2")
    Planner(inputs(hosts, "agg", **options)).check_python("n2")


def test_a_system_python_that_is_too_old_is_passed_by_with_a_newer_one_beside_it() -> None:
    new = {"n1": {"python": {"path": "/usr/bin/python3.12", "version": "3.12.3", "others": ["/usr/bin/python3.12"]}}}
    made = plan({"n1": host(1, venv_python="/usr/bin/python3.12")}, "agg", discovered=new)
    assert made["hosts"]["n1"]["venv_python"] == "/usr/bin/python3.12"
    assert made["hosts"]["n1"]["installs"]
