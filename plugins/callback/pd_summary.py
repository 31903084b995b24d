"""The last lines of every command: how long it took, and where it did not work, which host said what and what to do."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from ansible import constants, context
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: pd_summary
type: aggregate
short_description: Say at the end what failed on which host, and what to do
description:
  - A command that worked has printed its own table; this adds how long it took.
  - One that did not ends with a table of its hosts, the first line of every reason, and what to type next.
requirements: [enabled in ansible.cfg]
"""

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "library" / "module_utils"))

from pdlib import tables  # noqa: E402


def first_line(text: str) -> str:
    """Return what fits a table."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason was given").replace("Task failed: ", "")
    return line if len(line) <= 160 else line[:157] + "..."


class CallbackModule(CallbackBase):
    """Collects what the hosts said."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "pd_summary"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.started = time.time()
        self.said: dict[str, str] = {}
        self.verdict = ""
        self.command = "the command"

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Remember what was typed."""
        usual = [str(source) for source in constants.DEFAULT_HOST_LIST]
        # Values of -e may be secret: they are not repeated.
        given = [str(source) for source in context.CLIARGS.get("inventory") or ()]
        chosen = [
            f" -i {os.path.relpath(source) if os.path.exists(source) else source}" for source in given if source not in usual
        ]
        chosen += [f" -l {context.CLIARGS['subset']}"] if context.CLIARGS.get("subset") else []
        self.command = f"ansible-playbook {Path(playbook._file_name).name}{''.join(chosen)}"

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        """Remember why a host failed; what runs once for all hosts blames none of them."""
        if ignore_errors:
            return
        reason = f"FAILED at {result._task.get_name()}: {result._result.get('msg', '')}"
        if result._task.run_once:
            self.verdict = reason
        else:
            self.said[result._host.get_name()] = reason

    def v2_runner_on_unreachable(self, result: Any) -> None:
        """Remember why a host could not be reached: the one that the task was delegated to, if it was."""
        self.said[result._task.delegate_to or result._host.get_name()] = f"UNREACHABLE: {result._result.get('msg', '')}"

    @staticmethod
    def blameless(stats: Any, host: str) -> str:
        """Return what is said of a host that is not at fault."""
        return "not at fault; the reports above say what was done" if host in stats.changed else "not at fault; went no further"

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Print the summary."""
        took = tables.duration(time.time() - self.started)
        lost = [host for host in sorted(stats.processed) if host in stats.failures or host in stats.dark]
        if not lost:
            self._display.display(f"{self.command} took {took}")
            return
        # A host that the play could do without (ignore_unreachable) is not among the lost ones, but it did say something.
        told = {host: text for host, text in self.said.items() if host in lost or text.startswith("UNREACHABLE")}
        rows = [["all hosts", first_line(self.verdict)]] if self.verdict else []
        rows += [
            [host, first_line(told[host]) if host in told else self.blameless(stats, host)]
            for host in sorted({*stats.processed, *told}, key=lambda host: (host not in told, host))
        ]
        text = tables.table(["host", "what happened"], rows)
        hints = [f"next: put it right and type {self.command} again (with the same -e); it goes on from what is there"]
        dark = [host for host, text in told.items() if text.startswith("UNREACHABLE")]
        if dark:
            touched = any(host in stats.changed for host in stats.processed if host not in told)
            rest = "" if touched else "; what runs on other hosts was left as it is"
            hints.insert(0, f"unreachable: try ssh {dark[0]} by hand (docs/hosts.md){rest}")
        self._display.display("\n" + "\n".join([text, *hints, f"({self.command} ended after {took})"]) + "\n")
