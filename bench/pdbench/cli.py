"""The `pdbench` command: one verb a module, imported only when it is called (`emulate` must not load pandas)."""

from __future__ import annotations

import importlib
import os
import sys

from pdbench import __version__

#: verb -> (module with `main(argv) -> exit code`, extra that installs what it needs, one line of help)
VERBS: dict[str, tuple[str, str, str]] = {
    "run": ("pdbench.run.cli", "run", "load an endpoint and record every request"),
    "emulate": ("pdbench.emulate.cli", "", "serve as an SGLang prefill, decode or aggregated worker, without a GPU"),
    "selfcheck": ("pdbench.selfcheck.cli", "run", "say how far `run` can be trusted on this machine, at this load"),
    "merge": ("pdbench.merge", "run", "put the shares of several clients together: one run"),
    "profile": (
        "pdbench.profiling.cli",
        "run",
        "`run`, with a role's forward steps recorded by the engine's profiler (profile.yml)",
    ),
    "traces": ("pdbench.profiling.read", "run", "what the profiler's traces of a folder say: steps, kernels, ranks"),
    "fit": ("pdbench.fit.cli", "report", "the performance model's figures from measured runs, with the error on runs kept out"),
    "gate": ("pdbench.gate", "run", "decide whether a run is to be believed (validity.json)"),
    "search": ("pdbench.search.cli", "run", "the highest rate at which requests still meet their limits"),
    "advise": ("pdbench.advise.cli", "report", "which ratio to deploy, by simulation; how wrong such predictions were"),
    "autoscale": ("pdbench.autoscale.cli", "report", "change the ratio while clients are served, when queues say so"),
    "compare": ("pdbench.compare.cli", "report", "whether two configurations differ, by how much, and how sure that is"),
    "import": (
        "pdbench.importing.cli",
        "report",
        "results of SGLang's benchmark or the vLLM suite's logs, for compare and report",
    ),
    "export": ("pdbench.export", "report", "a run as another tool's result file: SGLang's JSON lines"),
    "peer": ("pdbench.peers.cli", "run", "SGLang's or vLLM's own bench client after a run, beside our figures"),
    "sweep": ("pdbench.sweep.cli", "report", "deploy and measure every cell of a file, in the order that restarts least"),
    "report": ("pdbench.report.cli", "report", "plots and report.html from the folder of a run or a sweep"),
}

#: verb -> what one types first; `--help` begins with it
FIRST: dict[str, str] = {
    "run": "--url http://ROUTER:8000 --model NAME --concurrency 32 --num-requests 200 --isl 512 --osl 128 --output results/mine",
    "emulate": "--role aggregated --port 30000 --profile h200-qwen2.5-3b",
    "selfcheck": "--concurrency 64 --osl 128",
    "merge": "results/merged results/merged/clients/n1 results/merged/clients/n2",
    "profile": "--url http://ROUTER:8000 --model NAME --plan plan.json --role decode --batch 64 --isl 512 --osl 128 "
    "--output results/mine     (or: ansible-playbook profile.yml -e role=decode)",
    "traces": "results/profiles/ID",
    "fit": "results/sweeps/NAME --base h200-qwen2.5-3b --output fitted.yml",
    "gate": "results/latest",
    "search": "goodput --output results/search -- --url http://ROUTER:8000 --model NAME --isl 512 --osl 128 --num-requests 300 "
    "--slo-ttft-ms 500",
    "advise": "-i inventory/h200x8 --profile h200-gpt-oss-120b --isl 2048 --osl 256 --concurrency 64",
    "autoscale": "-i inventory/local --slo-ttft-ms 500 --slo-tpot-ms 50 --dry-run",
    "compare": "results/RUN_A results/RUN_B",
    "import": "bench.jsonl --output results/old --ratio 3p1d --gpus 8",
    "export": "results/latest --format sglang --output run.jsonl",
    "peer": "results/latest --tool sglang",
    "sweep": "sweeps/local-demo.yml --dry-run",
    "report": "results/latest",
}


def usage() -> str:
    """Return the help text of the bare command."""
    rows = "\n".join(f"  {verb:<10}{text}" for verb, (_, _, text) in VERBS.items())
    return f"usage: pdbench VERB [options]     (pdbench VERB --help explains the verb)\n\n{rows}\n"


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 good, 1 could not, 2 bad usage, 3 measured but invalid."""
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output has seen enough (`| head`); what is still in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"pdbench {__version__}")
        return 0
    if args[0] not in VERBS:
        print(f"pdbench: unknown verb {args[0]!r}; one of: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module, extra, _ = VERBS[args[0]]
    try:
        verb = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("pdbench"):
            raise
        print(f"pdbench {args[0]} needs {missing.name}: .venv/bin/python -m pip install -e 'bench[{extra}]'", file=sys.stderr)
        return 1
    own = args[1 : args.index("--")] if "--" in args else args[1:]
    if {"-h", "--help"} & set(own):
        print(f"pdbench {args[0]} {FIRST[args[0]]}\n")
    code: int = verb.main(args[1:])
    return code
