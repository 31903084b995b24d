"""`make bench-deploy`: what the verbs cost as hosts are added, on the lab's hosts with the emulated engine.

For every number of hosts: deploy (installs included), deploy again (no change) and, as its peer, a play of as many empty tasks on
as many hosts, three times in turn, then another ratio. Wall time, tasks and SSH round trips per host, CPU and memory of the
controller. The hosts run on the same cores as the controller, so wall time contains their work, too; that is the same for the
empty play.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from lab import base, hosts
from lab.common import CONTROLLER, REPO, locked
from lab.controller import ANSIBLE, Controller

RESULTS = REPO / "docs" / "results"
#: Stands for ssh and adds a byte to a file for every call: one call is one round trip of Ansible, the file is one number.
ROUNDS = 3
COUNTING_SSH = '#!/bin/sh\nprintf . >> "$PD_SSH_COUNT"\nexec ssh "$@"\n'


@dataclass
class Cost:
    """What one command cost: the median of its runs by wall time.

    `tasks` and `trips` are means per worker host; memory is the peak of all its processes (PSS).
    """

    hosts: int
    command: str
    wall_s: float
    cpu_s: float
    memory_mb: float
    tasks: float
    trips: float
    changed: int
    runs: int = 1
    day: str = ""


def inventory(count: int) -> dict[str, Any]:
    """Return an inventory of `count` hosts of one GPU; the first half is for prefill, the first host has the router as well."""
    names = [f"h{number}" for number in range(1, count + 1)]
    half = (count + 1) // 2
    plain = yaml.safe_load((REPO / "tests" / "lab" / "inventory" / "hosts.yml").read_text())["all"]["vars"]
    # 48 workers that start at once on two cores need longer than the 120 s of the lab's inventory.
    changed = {"gpus": 1, "ratio": f"{half}p{count - half}d", "lab_net": CONTROLLER.rsplit(".", 1)[0], "ready_timeout": 1200}
    groups = {"prefill_nodes": names, "decode_nodes": names[::-1], "router": names[:1], "bench_clients": []}
    children = {group: {"hosts": dict.fromkeys(members)} for group, members in groups.items()}
    return {"all": {"vars": {**plain, **changed}, "children": children}}


def pss_mb(group: int) -> float:
    """Return the memory of a process group in MB: shared pages count once."""
    total = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if os.getpgid(int(folder.name)) == group:
                    total += int(re.search(r"^Pss:\s+(\d+)", (folder / "smaps_rollup").read_text(), re.M)[1])  # type: ignore[index]
            except (OSError, TypeError):
                continue
    return total / 1024


class Bench:
    """Runs commands on the lab and takes their cost."""

    def __init__(self, pd: Controller, count: int, folder: Path):
        self.pd, self.count = pd, count
        self.inventory = folder / f"hosts-{count}.yml"
        self.inventory.write_text(yaml.safe_dump(inventory(count)))
        self.wrapper, self.counter = folder / "counting-ssh", folder / "count"
        self.wrapper.write_text(COUNTING_SSH)
        self.wrapper.chmod(0o755)

    def cost(self, command: str, playbook: str | Path, *words: str) -> Cost:
        """Run one playbook."""
        self.counter.write_text("")
        env = {**os.environ, **self.pd.env, "PATH": f"{ANSIBLE.parent}:{os.environ['PATH']}"}
        env |= {"ANSIBLE_SSH_EXECUTABLE": str(self.wrapper), "PD_SSH_COUNT": str(self.counter)}
        env |= {"ANSIBLE_SSH_COMMON_ARGS": f"-F {self.pd.ssh_config}"}
        started = time.monotonic()
        process = subprocess.Popen(
            ["ansible-playbook", str(playbook), "-i", str(self.inventory), *words], cwd=self.pd.home, env=env, text=True,
            start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        peak = [0.0]

        def watch() -> None:
            while process.poll() is None:
                peak[0] = max(peak[0], pss_mb(process.pid))
                time.sleep(1)

        before = os.times()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        text, _ = process.communicate()
        after, wall = os.times(), time.monotonic() - started
        watcher.join()
        if process.returncode:
            raise SystemExit(f"{command} on {self.count} hosts failed:\n{text[-4000:]}")
        rows = re.findall(r"^h\d+\s+: ok=(\d+)\s+changed=(\d+)", text, re.M)
        return Cost(
            hosts=self.count, command=command, wall_s=wall, memory_mb=peak[0],
            cpu_s=after.children_user + after.children_system - before.children_user - before.children_system,
            tasks=sum(int(ok) for ok, _ in rows) / len(rows), changed=sum(int(changed) for _, changed in rows),
            trips=len(self.counter.read_text()) / self.count, day=time.strftime("%Y-%m-%d"),
        )  # fmt: skip

    def all(self) -> list[Cost]:
        """Run the story; say every figure as it comes."""
        half = (self.count + 1) // 2
        other = f"{half - 1}p{self.count - half + 1}d"
        deploy = self.cost("deploy", "deploy_pd.yml")
        say(deploy)
        again: list[Cost] = []
        peers: list[Cost] = []
        empty = self.inventory.with_name("empty.yml")
        for _ in range(ROUNDS):
            settle()
            again.append(self.cost("no change", "deploy_pd.yml"))
            say(again[-1])
            pings = [{"ansible.builtin.ping": None, "name": f"empty {number}"} for number in range(round(again[-1].tasks))]
            play = {"hosts": "all", "gather_facts": False, "tasks": pings}
            empty.write_text(yaml.safe_dump([play], sort_keys=False))
            settle()
            peers.append(self.cost("empty play", empty))
            say(peers[-1])
        settle()
        ratio = self.cost("ratio change", "deploy_pd.yml", "-e", f"ratio={other}")
        say(ratio)
        teardown = self.cost("teardown", "teardown.yml")
        say(teardown)
        return [deploy, middle(again), ratio, middle(peers), teardown]


def middle(costs: list[Cost]) -> Cost:
    """Return the run with the median wall time."""
    return replace(sorted(costs, key=lambda cost: cost.wall_s)[len(costs) // 2], runs=len(costs))


def settle() -> None:
    """Wait until the machine is mostly idle, two minutes at most: what a deploy leaves behind is not the next command's cost."""

    def times() -> tuple[int, int]:
        words = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return words[3] + words[4], sum(words)

    for _ in range(60):
        idle, whole = times()
        time.sleep(2)
        idle_now, whole_now = times()
        if idle_now - idle > 0.8 * (whole_now - whole):
            return


def say(cost: Cost) -> None:
    """Print one row."""
    print(
        f"{cost.hosts:3} hosts  {cost.command:13} {cost.wall_s:6.1f} s  {cost.cpu_s:6.1f} CPU s  {cost.memory_mb:5.0f} MB  "
        f"{cost.tasks:5.1f} tasks a host  {cost.trips:5.1f} SSH calls a host  changed {cost.changed}",
        flush=True,
    )


def plot(costs: list[Cost], path: Path) -> None:
    """Draw wall time and controller CPU against the number of hosts."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(cost.command for cost in costs))
    for axis, field, label in zip(axes, ("wall_s", "cpu_s"), ("wall time (s)", "CPU of the controller (s)"), strict=True):
        for name in names:
            rows = [cost for cost in costs if cost.command == name]
            axis.plot(
                [r.hosts for r in rows], [getattr(r, field) for r in rows], "o--" if name == "empty play" else "o-", label=name
            )
        # A deploy installs, and takes ten times as long as the rest.
        axis.set(xlabel="hosts", ylabel=label, xlim=(0, None), yscale="log")
        axis.set_xticks(sorted({cost.hosts for cost in costs}))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def page(costs: list[Cost]) -> str:
    """Return docs/results/deploy-scale.md."""
    columns = ["hosts", "command", "wall s", "controller CPU s", "memory MB", "tasks a host", "SSH calls a host"]
    columns += ["wall / empty play", "runs", "day"]
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    rows = []
    for cost in costs:
        peer = next(c for c in costs if c.hosts == cost.hosts and c.command == "empty play")
        share = f"{cost.wall_s / peer.wall_s:.2f}" if cost.command == "no change" else ""
        rows.append(
            f"| {cost.hosts} | {cost.command} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | {cost.memory_mb:.0f} | {cost.tasks:.1f} "
            f"| {cost.trips:.1f} | {share} | {cost.runs} | {cost.day} |\n"
        )
    cores = os.cpu_count()
    about = (
        f"Measured on {cores} cores, Python {platform.python_version()}, {ansible_version()}. Real systemd hosts over SSH "
        f"(tests/lab) on the *same* {cores} cores, emulated engine (no GPU was used), one GPU a host declared, half of them "
        "prefill. The empty play has as many `ping` tasks as the no-op has tasks; both run in turn, on a machine that has come "
        "to rest, and of several runs the median is shown."
    )
    why = (
        "What a no-op costs beyond the empty play: Ansible builds an archive of every *different* module once a command (four of "
        "ours, one `ping`), every host compiles the module that it is sent, and ours read facts, units and processes where ping "
        "reads nothing."
    )
    once = sorted({cost.hosts for cost in costs if cost.command == "no change" and cost.runs == 1})
    if once:
        why += (
            f"\n\n**{', '.join(map(str, once))} hosts: one run each, right after the deploy, not at rest**, with other work on "
            "the machine during the deploy and briefly during the no-op: read these rows as upper bounds."
        )
    picture = "![wall time and CPU against hosts](deploy-scale.png)"
    title = "# What a deployment costs as hosts are added\n\n    make bench-deploy"
    return "\n\n".join([title, about, why, picture, head + "".join(rows)])


def ansible_version() -> str:
    """Return what is being measured."""
    text = subprocess.run([str(ANSIBLE), "--version"], capture_output=True, text=True, check=True).stdout
    return "ansible-" + text.split("[", 1)[1].split("]", 1)[0]


def main() -> int:
    """Measure, and write the page, the picture and the figures."""
    parser = argparse.ArgumentParser(prog="make bench-deploy", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("counts", nargs="*", type=int, default=[4, 16, 48], help="numbers of hosts (default: 4 16 48)")
    counts = parser.parse_args().counts
    reason = base.unfit()
    if reason:
        print(f"bench-deploy: {reason}", file=sys.stderr)
        return 1
    costs: list[Cost] = []
    with locked(), tempfile.TemporaryDirectory() as folder:
        for count in counts:
            hosts.down()
            hosts.up(count)
            pd = Controller(Path(tempfile.mkdtemp(prefix="pd-lab-")))
            try:
                costs += Bench(pd, count, Path(folder)).all()
            finally:
                pd.close()
                hosts.down()
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / "deploy-scale.json"
    old = [Cost(**row) for row in json.loads(kept.read_text())] if kept.exists() else []
    # Numbers of hosts that were not asked for now keep what was measured then.
    costs = sorted([row for row in old if row.hosts not in counts] + costs, key=lambda row: row.hosts)
    (RESULTS / "deploy-scale.json").write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")
    (RESULTS / "deploy-scale.md").write_text(page(costs))
    plot(costs, RESULTS / "deploy-scale.png")
    print(f"written: {(RESULTS / 'deploy-scale.md').relative_to(REPO)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
