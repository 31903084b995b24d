"""`/start_profile`: the scheduler's steps as a small Chrome trace, under the names that SGLang 0.5.23 gives its traces."""

from __future__ import annotations

import gzip
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdbench.model.requests import Step

log = logging.getLogger("pdbench.emulate")

#: What SGLang calls the stages in the names of files.
_STAGE_NAMES: dict[str, str] = {"prefill": "EXTEND", "decode": "DECODE"}
#: Without `num_steps` nobody may ever stop: steps beyond this many are not kept.
MOST_STEPS = 100_000


class ProfileError(ValueError):
    """A profile that cannot be started or stopped; `status` is the HTTP status that SGLang gives then."""

    def __init__(self, message: str, status: int) -> None:
        """Say what is wrong."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Wanted:
    """What `/start_profile` asks for. `activities`, `with_stack` and the like mean nothing here: there is no GPU to look into."""

    output_dir: Path
    profile_id: str
    prefix: str
    start_step: int
    num_steps: int
    by_stage: bool
    stages: tuple[str, ...]


class Profiler:
    """Collects steps while a profile runs and writes them when it ends."""

    def __init__(self, possible: Callable[[], Sequence[str]]) -> None:
        """Start idle; `possible` returns the stages that this worker computes, in its role of now."""
        self._possible = possible
        self._step = 0
        self._wanted: Wanted | None = None
        self._begin = 0
        #: what is still to be collected: stage ("" for all together) -> its steps so far
        self._open: dict[str, list[Step]] = {}

    @property
    def running(self) -> bool:
        """Whether steps are collected or waited for."""
        return self._wanted is not None

    def start(self, body: object) -> None:
        """Begin to collect, at `start_step` when there is one. Raises ProfileError."""
        if self._wanted is not None:
            raise ProfileError("Profiling is already in progress. Call /stop_profile first.", 500)
        wanted = _read(body)
        stages = [stage for stage in wanted.stages if stage in self._possible()] if wanted.by_stage else [""]
        if not stages:
            raise ProfileError(f"profile_stages: this worker only has {' and '.join(self._possible())} steps", 400)
        try:
            wanted.output_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=wanted.output_dir).close()
        except OSError as problem:
            raise ProfileError(f"output_dir {wanted.output_dir} cannot be written: {problem.strerror}", 400) from None
        self._wanted, self._open = wanted, {stage: [] for stage in stages}
        self._begin = max(wanted.start_step, self._step + 1) if wanted.start_step else 0

    def step(self, step: Step) -> None:
        """Take notice of one step of the scheduler; writes a trace when it has all its steps."""
        self._step += 1
        wanted = self._wanted
        if wanted is None or self._step < self._begin:
            return
        stage = step.kind if wanted.by_stage else ""
        steps = self._open.get(stage)
        if steps is None or len(steps) == MOST_STEPS:
            return
        steps.append(step)
        if len(steps) == wanted.num_steps:
            try:
                log.info("profile written: %s", _write(wanted, stage, self._open.pop(stage)))
            except OSError as problem:
                log.error("the profile is lost: %s", problem)
            if not self._open:
                self._wanted = None

    def stop(self) -> list[Path]:
        """Write what there is and return the files. Raises ProfileError when nothing runs, OSError when it cannot be written."""
        if self._wanted is None:
            raise ProfileError("Profiling is not in progress. Call /start_profile first.", 500)
        wanted, self._wanted = self._wanted, None
        return [_write(wanted, stage, steps) for stage, steps in self._open.items()]


def _write(wanted: Wanted, stage: str, steps: list[Step]) -> Path:
    front = f"{wanted.prefix}-" if wanted.prefix else ""
    back = f"-{_STAGE_NAMES[stage]}" if stage else ""
    path = wanted.output_dir / f"{front}{wanted.profile_id}-TP-0{back}.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps(_trace(steps)).encode()))
    return path


def _trace(steps: list[Step]) -> dict[str, object]:
    """Return the steps in Chrome's trace event format; times in microseconds."""
    process = os.getpid()
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": process, "args": {"name": "pdbench emulate (emulated: no GPU)"}}
    ]
    events += [
        {
            "ph": "X",
            "cat": "user_annotation",
            "name": f"step[{_STAGE_NAMES[step.kind]} bs={step.requests} toks={step.tokens}]",
            "pid": process,
            "tid": 0,
            "ts": step.start * 1e6,
            "dur": (step.end - step.start) * 1e6,
            "args": {"requests": step.requests, "tokens": step.tokens},
        }
        for step in steps
    ]
    return {"schemaVersion": 1, "emulated": True, "traceEvents": events}


def _read(body: object) -> Wanted:
    if body is None:
        body = {}
    if not isinstance(body, dict):
        raise ProfileError("the body must be a JSON object", 422)
    if body.get("merge_profiles"):
        raise ProfileError("merge_profiles: an emulated worker has one rank, hence nothing to merge; leave it out", 400)
    steps = {}
    for key in ("start_step", "num_steps"):
        value = body.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ProfileError(f"{key} must be a whole number above 0, not {value!r}", 422)
        steps[key] = value or 0
    texts = {}
    for key in ("output_dir", "profile_id", "profile_prefix"):
        value = body.get(key)
        if value is not None and (not isinstance(value, str) or (key != "output_dir" and "/" in value)):
            raise ProfileError(f"{key} must be text{'' if key == 'output_dir' else ' without /'}, not {value!r}", 422)
        texts[key] = value or ""
    by_stage = body.get("profile_by_stage", False)
    if not isinstance(by_stage, bool):
        raise ProfileError(f"profile_by_stage must be true or false, not {by_stage!r}", 422)
    if by_stage and not steps["num_steps"]:
        raise ProfileError("profile_by_stage needs num_steps", 400)
    stages = body.get("profile_stages") or list(_STAGE_NAMES)
    if not isinstance(stages, list) or not all(stage in _STAGE_NAMES for stage in stages):
        raise ProfileError(f"profile_stages must be a list of {' and '.join(_STAGE_NAMES)}, not {stages!r}", 422)
    return Wanted(
        output_dir=Path(texts["output_dir"] or os.environ.get("SGLANG_TORCH_PROFILER_DIR") or tempfile.gettempdir()).expanduser(),
        profile_id=texts["profile_id"] or str(time.time()),
        prefix=texts["profile_prefix"],
        by_stage=by_stage,
        stages=tuple(stages),
        **steps,
    )
