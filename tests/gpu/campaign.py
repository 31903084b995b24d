"""The verbs on real GPUs, one stage after the other, with all that they said and measured kept in one folder.

    .venv/bin/python tests/gpu/campaign.py OUT agg mooncake-nvlink mooncake-tcp nixl 2p2d 3p1d by-hand teardown

Run in the root of the checkout; tests/gpu/README.md says what must be there. Every stage is a few commands that a user types
(OUT/commands.jsonl, OUT/NN-*.log), and the folder of its run (OUT/runs/STAGE). After its run each PD stage is asked for greedy
answers, which must be those that stage `agg` gave. A stage that fails does not stop the next one; the exit code says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "library" / "module_utils"), str(ROOT / "bench")]

from gpu import by_hand, kv  # noqa: E402

Json = dict[str, Any]
BIN = ROOT / ".venv" / "bin"
REPORT = "kv_probe=report"
#: Larger files of a run stay where they are.
LARGEST = 6_000_000
NVLINK = {"MC_INTRANODE_NVLINK": "1", "SGLANG_MOONCAKE_CUSTOM_MEM_POOL": "INTRA_NODE_NVLINK"}


def both(env: dict[str, str]) -> list[str]:
    """Return options that add an environment to prefill and decode workers."""
    return ["-e", json.dumps({"prefill_engine_env": env, "decode_engine_env": env})]


#: Prompts that are long beside their answers, where prefill in the way of decode shows.
LONG = {"api": "generate", "num_requests": "192", "concurrency": "64", "input_len": "4096", "output_len": "64"}


def asked(load: dict[str, str]) -> list[str]:
    """Return options for a load."""
    return [word for name, value in load.items() for word in ("-e", f"bench_{name}={value}")]


#: stage -> commands: verb and its options; `{load}` stands for the load.
STAGES: dict[str, list[list[str]]] = {
    "agg": [["deploy_pd.yml", "-e", "ratio=agg"], ["bench.yml", "-e", "ratio=agg", "{load}"]],
    "mooncake-nvlink": [
        ["deploy_pd.yml", "-e", "ratio=1p1d", "-e", "transfer_backend=mooncake", *both(NVLINK)],
        ["bench.yml", "-e", "ratio=1p1d", "{load}"],
    ],
    "mooncake-tcp": [
        ["deploy_pd.yml", "-e", "ratio=1p1d", "-e", "transfer_backend=mooncake_tcp"],
        ["bench.yml", "-e", "ratio=1p1d", "{load}"],
    ],
    "nixl": [["deploy_pd.yml", "-e", "ratio=1p1d"], ["bench.yml", "-e", "ratio=1p1d", "{load}"]],
    # What is deployed stays; only the load is another one.
    **{f"{name}-long": [["bench.yml", *asked(LONG)]] for name in ("agg", "nixl", "3p1d")},
    # A change of the ratio is one command: what runs stays, and the router with it.
    "4agg": [["deploy_pd.yml", "-e", "ratio=4agg"], ["bench.yml", "-e", "ratio=4agg", "{load}"]],
    "2p2d": [["bench.yml", "-e", "ratio=2p2d", "{load}"]],
    "3p1d": [["bench.yml", "-e", "ratio=3p1d", "{load}"]],
    "by-hand": [["deploy_pd.yml", "-e", "ratio=1p1d"]],
    "doctor": [["doctor.yml"]],
    "teardown": [["teardown.yml"]],
}


class Campaign:
    """One folder of results; ``options`` go to every verb, ``load`` to every bench.yml."""

    def __init__(self, out: Path, inventory: str, options: list[str], load: list[str]):
        self.out, self.inventory, self.options, self.load = out, inventory, options, load
        (out / "runs").mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Print a line with the time of day."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def verb(self, stage: str, words: list[str]) -> int:
        """Run a verb as a user does; keep what it said."""
        options = [*words[1:], *self.options, *(["-e", f"run_label={stage}"] if words[0] == "bench.yml" else [])]
        command = ["ansible-playbook", words[0], "-i", self.inventory, *options]
        number = len(list(self.out.glob("[0-9][0-9]-*.log")))
        log = self.out / f"{number:02d}-{stage}-{words[0].removesuffix('.yml')}.log"
        env = {**os.environ, "ANSIBLE_NOCOLOR": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
        started = time.monotonic()
        with log.open("w") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            code = subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL).returncode
        seconds = round(time.monotonic() - started, 1)
        said = log.read_text(errors="replace")
        with (self.out / "commands.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, "command": shlex.join(command), "code": code, "seconds": seconds}) + "\n")
        self.say(f"{stage}: {words[0]} ended with {code} after {seconds} s")
        if code:
            print("\n".join(said.splitlines()[-45:]), flush=True)
        if code and "paths of the KV cache are not as they should be" in said and REPORT not in self.options:
            # What the probe is wrong about, or right, is seen in the runs that follow; without them nothing would be.
            self.options += ["-e", REPORT]
            return self.verb(stage, words)
        return code

    def keep_run(self, stage: str, before: str) -> None:
        """Copy the newest run's folder, if it is a new one, and make its table of KV transfers."""
        latest = ROOT / "results" / "latest"
        if not latest.exists() or str(latest.resolve()) == before:
            return
        target = self.out / "runs" / stage
        shutil.rmtree(target, ignore_errors=True)
        small = shutil.ignore_patterns(*(p.name for p in latest.rglob("*") if p.is_file() and p.stat().st_size > LARGEST))
        shutil.copytree(latest.resolve(), target, ignore=small)
        table = kv.table(target)
        (target / "kv.json").write_text(json.dumps(table, indent=1) + "\n")
        summary = json.loads((target / "summary.json").read_text())
        for point in summary["points"]:
            self.say(
                f"{stage}: {point['output_throughput']:.0f} tok/s, "
                f"TTFT p50 {point['ttft_ms']['p50']:.0f} p99 {point['ttft_ms']['p99']:.0f} ms, "
                f"ITL mean {point['itl_ms']['mean']:.2f} p99 {point['itl_ms']['p99']:.2f} ms"
            )
        for row in table:
            self.say(f"{stage}: KV {row}")

    def plan(self) -> Json:
        """Return the deployed plan (the controller's copy)."""
        newest = max((ROOT / ".pd" / "deployed").glob("*.json"), key=lambda path: path.stat().st_mtime)
        found: Json = json.loads(newest.read_text())
        return found

    def answers(self, stage: str) -> bool:
        """Ask for greedy answers and compare them with those of `agg`; return whether they are the same."""
        plan = self.plan()
        url, prompts = plan["router"]["url"], greedy_prompts(seed=1)
        flush(plan)
        got = greedy(url, prompts)
        (self.out / f"answers-{stage}.json").write_text(json.dumps(got) + "\n")
        if not all(got):
            self.say(f"{stage}: {sum(not answer for answer in got)} of {len(prompts)} prompts were not answered")
            return False
        first = self.out / "answers-agg.json"
        if stage == "agg":
            # The control: the start of a prompt matters to its answer, so that equal answers say something of the KV cache.
            other = [random.Random(i).choices(range(300, 3800), k=max(1, len(p) // 10)) for i, p in enumerate(prompts)]
            flush(plan)
            changed = greedy(url, [[*new, *prompt[len(new) :]] for new, prompt in zip(other, prompts, strict=True)])
            count = sum(a != b for a, b in zip(got, changed, strict=True))
            flush(plan)
            again = sum(a != b for a, b in zip(got, greedy(url, prompts), strict=True))
            self.say(
                f"agg: {count} of {len(prompts)} answers change with the first tenth of the prompt; asked again {again} differ"
            )
            return count == len(prompts) and again == 0
        if not first.exists():
            self.say(f"{stage}: nothing to compare its answers with: run stage agg first")
            return False
        wanted = json.loads(first.read_text())
        differ = [i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b]
        self.say(f"{stage}: {len(prompts) - len(differ)} of {len(prompts)} greedy answers are those of agg, differing: {differ}")
        return not differ

    def stage(self, name: str) -> bool:
        """Run a stage; return whether all of it went well."""
        self.say(f"== {name}")
        latest = ROOT / "results" / "latest"
        before = str(latest.resolve()) if latest.exists() else ""
        good = True
        for words in STAGES[name]:
            filled = [word for item in words for word in (self.load if item == "{load}" else [item])]
            good = self.verb(name, filled) == 0 and good
            if not good and words[0] == "deploy_pd.yml":
                return False
        if name not in ("teardown", "doctor", "by-hand"):
            self.keep_run(name, before)
        if name == "doctor" and (ROOT / "results" / "doctor.json").exists():
            shutil.copy(ROOT / "results" / "doctor.json", self.out / "doctor.json")
        if "{load}" in STAGES[name][-1]:
            good = self.answers(name) and good
        probed = ROOT / "results" / "kv_probe.json"
        if probed.exists():
            shutil.copy(probed, self.out / f"kv_probe-{name}.json")
        return good


def greedy_prompts(seed: int) -> list[list[int]]:
    """Return 24 prompts of 8 to 2000 random token ids."""
    rng = random.Random(seed)
    return [rng.choices(range(300, 3800), k=length) for length in (8, 17, 64, 129, 256, 512, 1000, 2000) for _ in range(3)]


def flush(plan: Json) -> None:
    """Empty the prefix caches: with a part of the prompt cached, sums are made in another order, and these weights show it."""
    for worker in plan["workers"]:
        request = urllib.request.Request(f"{worker['url']}/flush_cache", b"", method="POST")
        for _ in range(50):
            try:
                with urllib.request.urlopen(request, timeout=10):
                    break
            except urllib.error.HTTPError:
                # It still holds requests.
                time.sleep(0.2)


def greedy(url: str, prompts: list[list[int]], tokens: int = 16) -> list[list[int]]:
    """Return the greedy answers of a router, one request after the other: batches would change the order of sums."""

    def one(prompt: list[int]) -> list[int]:
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body = json.dumps({"input_ids": prompt, "sampling_params": sampling}).encode()
        request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return [int(token) for token in json.loads(answer.read())["output_ids"]]
        except (OSError, ValueError, KeyError, urllib.error.URLError) as why:
            print(f"no answer: {why}", flush=True)
            return []

    with ThreadPoolExecutor(1) as pool:
        return list(pool.map(one, prompts))


def main() -> int:
    """Run the stages that are named; 1 when one did not go well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("stages", nargs="+", choices=list(STAGES))
    parser.add_argument("-i", "--inventory", default="inventory/h200-local")
    parser.add_argument("-e", "--extra-vars", action="append", default=[], help="for every verb")
    parser.add_argument("--requests", default="512")
    parser.add_argument("--concurrency", default="64")
    parser.add_argument("--input-len", default="512")
    parser.add_argument("--output-len", default="128")
    parser.add_argument("--pairs", type=int, default=10, help="of runs, in the comparison with a deployment started by hand")
    given = parser.parse_args()
    options = [word for value in given.extra_vars for word in ("-e", value)]
    load = {"api": "generate", "num_requests": given.requests, "concurrency": given.concurrency,
            "input_len": given.input_len, "output_len": given.output_len}  # fmt: skip
    made = Campaign(given.out.resolve(), given.inventory, options, asked(load))
    good = True
    for name in given.stages:
        fine = made.stage(name)
        if fine and name == "by-hand":
            sizes = ["--num-requests", given.requests, "--concurrency", given.concurrency.split(",")[-1]]
            sizes += ["--isl", given.input_len, "--osl", given.output_len]
            fine = by_hand.compare(made.out, made.plan(), str(BIN / "python"), sizes, given.pairs, made.say)
        good = fine and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
