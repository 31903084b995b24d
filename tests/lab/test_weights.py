"""A model that one systemd host has reaches the others, over the network between them."""

from __future__ import annotations

import os
import signal

import pytest
from lab import network
from lab.controller import Controller, forget, sh, until

ROOT = "/var/lib/pd-models/tiny--model"
ARGS = ("-e", "model=tiny/model", "-e", "model_source=rsync")
MAKE = f"""
set -e; mkdir -p {ROOT}/sub; cd {ROOT}; echo '{{}}' > config.json; echo x > sub/notes.txt
python3 -c "
import json, os, struct, sys
head = json.dumps(dict(w=dict(dtype='U8', shape=[$SIZE], data_offsets=[0, $SIZE]))).encode()
open('model.safetensors', 'wb').write(struct.pack('<Q', len(head)) + head + os.urandom($SIZE))"
"""
CHECKSUM = "find . -type f -not -path './.*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-64"
PROGRAM = "pgrep -fa [m]odel_tool.py || true"


def make(host: str, size: int) -> str:
    """Put a model of ``size`` bytes of weights on a host; return its checksum, as a person would make it."""
    sh(host, MAKE.replace("$SIZE", str(size)))
    return checksum(host)


def checksum(host: str) -> str:
    return sh(host, f"cd {ROOT} && {CHECKSUM}")


@pytest.fixture
def fresh(pd: Controller) -> Controller:
    forget(pd)
    for host in ("h1", "h2", "h3"):
        sh(host, "rm -rf /var/lib/pd-models")
    return pd


def test_the_host_that_has_the_model_gives_it_and_weights_outlive_a_purge(fresh: Controller) -> None:
    pd = fresh
    digest = make("h2", 40_000_000)
    wrong = pd.play("deploy_pd.yml", *ARGS, "-e", f"model_sha256={'f' * 64}").bad()
    assert "h2 (another checksum)" in wrong.words

    right = (*ARGS, "-e", f"model_sha256={digest}")
    done = pd.play("deploy_pd.yml", *right).good()
    assert "copied tiny/model (0.04 GB) from h2" in done.text
    assert [checksum(host) for host in ("h1", "h2", "h3")] == [digest] * 3
    # the services' user reads what root's umask and the copy left
    assert sh("h1", f"runuser -u pd -- sha256sum {ROOT}/model.safetensors | wc -l") == "1"
    assert [sh(host, PROGRAM) for host in ("h1", "h2", "h3")] == ["", "", ""]
    assert set(pd.play("deploy_pd.yml", *right).good().changed.values()) == {0}

    pd.play("teardown.yml", "-e", "purge=true").good()
    assert [checksum(host) for host in ("h1", "h2", "h3")] == [digest] * 3


def test_a_copy_outlives_its_controller_and_the_next_deploy_goes_on(fresh: Controller) -> None:
    pd = fresh
    digest = make("h2", 60_000_000)
    network.shape("h1", "20mbit", 0)
    running = pd.start("deploy_pd.yml", *ARGS)
    part = f"stat -c %s {ROOT}.part/model.safetensors 2>/dev/null || echo 0"
    try:
        until("the copy has begun", lambda: int(sh("h1", part)) > 1_000_000, 120)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    before = int(sh("h1", part))
    # the server runs as the services' user, and the token stands in nobody's command line
    assert sh("h2", "ps -o user= -p $(pgrep -f [m]odel_tool.py)") == "pd"
    assert len(sh("h2", PROGRAM).split()) == 3
    until("it goes on without a controller", lambda: int(sh("h1", part)) > before, 60)
    network.unshape("h1")
    pd.play("deploy_pd.yml", *ARGS).good()
    assert checksum("h1") == digest
    assert sh("h1", f"ls -d {ROOT}.* | sort") == f"{ROOT}.pd.json"
    assert [sh(host, PROGRAM) for host in ("h1", "h2", "h3")] == ["", "", ""]
