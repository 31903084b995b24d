"""Several real systemd hosts on one machine, for testing playbooks over SSH.

  PYTHONPATH=tests python -m lab up 4        make and boot h1 to h4 (again: what is off is turned on)
  ... status                                 one line a host
  ... exec -- ssh -F .pd/lab/lab/ssh_config h1   run at the controller's end of the bridge
  ... sh h1 -- journalctl -n 20              run as root in a host, without SSH
  ... kill h2                                power loss (the disk stays)
  ... freeze h2 | thaw h2                    a host that hangs: it answers ping and nothing else
  ... unplug h2                              its cable is out
  ... partition h1 h2                        only these two do not reach each other (or: h1 controller)
  ... heal                                   every cut and cable as before
  ... shape h1 --rate 50mbit --delay 10      (ms, each way; without options: as before)
  ... down [--purge]                         all off and gone, but the base root (--purge: that, too)
  ... deps                                   install the Debian packages that the lab needs

From outside the bridge: ssh -F .pd/lab/lab/ssh_config.outside h1. Needs root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from lab import base, cgroups, hosts, network
from lab.common import DIR, LabError, load, locked
from lab.relay import relay


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("up").add_argument("count", type=int, nargs="?", default=4)
    verbs.add_parser("down").add_argument("--purge", action="store_true")
    for name in ("status", "heal", "deps"):
        verbs.add_parser(name)
    for name in ("kill", "freeze", "thaw", "unplug"):
        verbs.add_parser(name).add_argument("host")
    cut = verbs.add_parser("partition")
    cut.add_argument("host")
    cut.add_argument("other")
    shape = verbs.add_parser("shape")
    shape.add_argument("host")
    shape.add_argument("--rate", default="")
    shape.add_argument("--delay", type=float, default=0.0)
    inside = verbs.add_parser("sh")
    inside.add_argument("host")
    for command in (verbs.add_parser("exec"), inside):
        command.add_argument("command", nargs=argparse.REMAINDER)
    socket = verbs.add_parser("_fd")
    socket.add_argument("host")
    socket.add_argument("port")
    process = verbs.add_parser("_relay")
    process.add_argument("host")
    process.add_argument("delay", type=float)
    return parser.parse_args()


def _change(given: argparse.Namespace) -> None:
    """Do a verb that changes the lab; one at a time."""
    match given.verb:
        case "up":
            hosts.up(given.count)
        case "down":
            hosts.down()
            if given.purge:
                shutil.rmtree(DIR)
        case "kill":
            hosts.kill(given.host)
        case "freeze" | "thaw":
            cgroups.freeze(given.host, given.verb == "freeze")
        case "unplug":
            network.unplug(given.host)
        case "partition":
            network.partition(given.host, given.other)
        case "heal":
            network.heal()
        case "shape":
            network.shape(given.host, given.rate, given.delay)


def main() -> None:
    """Do one verb."""
    given = _arguments()
    if given.verb == "deps":
        return base.install_needs()
    reason = base.unfit()
    if reason:
        raise LabError(reason)
    host = getattr(given, "host", None)
    if host and given.verb != "_fd" and not load(host):
        raise LabError(f"there is no {host}: see `lab status`")
    match given.verb:
        case "_relay":
            relay(given.host, given.delay)
        case "_fd":
            network.hand_over(given.host, given.port)
        case "status":
            print("\n".join(hosts.status()))
        case "exec" | "sh":
            words = given.command[1:] if given.command[:1] == ["--"] else given.command
            line = hosts.on_switch(words) if given.verb == "exec" else hosts.on_host(given.host, words)
            os.execvp(line[0], line)
        case _:
            with locked():
                _change(given)
    return None


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        sys.exit(f"lab: {error}")
