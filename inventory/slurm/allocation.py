#!/usr/bin/env python3
# ruff: noqa: D100  (where this fails, Ansible tries it as an INI file, and a docstring would be a host there)
# The nodes of the Slurm allocation that this runs in, as an inventory; Ansible calls it with --list.

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "library" / "module_utils"))

from pdlib import slurm
from pdlib.errors import UserError


def address_of(node: str) -> str:
    """Return a node's IPv4 address; raise UserError when its name says nothing."""
    try:
        return str(socket.getaddrinfo(node, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as why:
        raise UserError(f"node {node} has no address here: {why.strerror or why}") from None


try:
    print(json.dumps(slurm.inventory(os.environ, address_of), indent=1))
except UserError as wrong:
    sys.exit(str(wrong))
