"""A router that speaks TLS, as typed: what is refused, who asks it, where its private key lies."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.request
from pathlib import Path

import pytest
from certificates import Certificate, certificate
from local.conftest import Checkout

LOAD = ("-e", "bench_concurrency=4", "-e", "bench_num_requests=24", "-e", "bench_output_len=16")


def words(own: Certificate, ca: Certificate | None = None) -> list[str]:
    """The variables, typed."""
    given = {"router_tls_cert": own.cert, "router_tls_key": own.key, **({"router_tls_ca": ca.cert} if ca else {})}
    return [word for name, path in given.items() for word in ("-e", f"{name}={path}")]


def workers(clean: Checkout, ca: Certificate) -> int:
    """How many the router counts, asked over TLS by somebody else."""
    context = ssl.create_default_context(cafile=ca.cert)
    with urllib.request.urlopen(clean.url.replace("http:", "https:") + "/workers", timeout=30, context=context) as answer:
        return len(json.loads(answer.read())["workers"])


def test_refused_before_any_host_is_touched(checkout: Checkout, tmp_path: Path) -> None:
    own, old, bare = certificate(tmp_path, "own"), certificate(tmp_path, "old", days=0), certificate(tmp_path, "bare")
    away = certificate(tmp_path, "away", ("192.0.2.1",))
    bare.key.chmod(0o644)
    for given, said in (
        (words(own)[:2], "router_tls_cert is set, and router_tls_key is not"),
        ([*words(own)[:2], "-e", "router_tls_key=/nonexistent"], "router_tls_key=/nonexistent: there is no such file"),
        (words(old), "refuse it: certificate has expired"),
        (words(away), "refuse it: IP address mismatch, certificate is not valid for '127.0.0.1'"),
        (words(own, old), "refuse it: "),
        (words(bare), "has mode 0644, so others can read it"),
        ([*words(own), "-e", "router=mini-lb", "-e", "router_policy=random"], "router=mini-lb speaks no TLS"),
    ):
        failed = checkout.play("deploy_pd.yml", *given)
        text = " ".join(failed.text.split())
        assert failed.code != 0
        assert said in text, failed.text
        assert "Traceback" not in failed.text
    assert checkout.processes() == []


def test_every_client_of_ours_asks_over_tls(clean: Checkout, tmp_path: Path) -> None:
    ca = certificate(tmp_path, "ca", ())
    own = certificate(tmp_path, "own", signer=ca)
    done = clean.measured(*words(own, ca), *LOAD)
    assert f"ready: {clean.url.replace('http:', 'https:')}" in done.text
    run = clean.folder / "results" / "latest"
    assert json.loads((run / "validity.json").read_text())["valid"] is True
    evidence = json.loads((run / "evidence.json").read_text())["points"][0]
    assert len(evidence["after"]["router"]["workers"]) == 4, "the router said so over TLS"
    # the kernel's stamps are of encrypted bytes: the run says that it has none
    assert json.loads((run / "summary.json").read_text())["points"][0]["client"]["stamped_share"] == 0
    assert workers(clean, ca) == 4
    with pytest.raises((OSError, http.client.HTTPException)):
        clean.ask("/workers")
    text = own.key.read_bytes()
    holding = [path for path in clean.folder.rglob("*") if path.is_file() and text.strip() in path.read_bytes()]
    assert [str(path.relative_to(clean.folder)) for path in holding] == [".pd/state-a100/secrets/router_tls_key"]
    assert holding[0].stat().st_mode & 0o777 == 0o600
    # what was typed for the deploy holds for those who ask it
    before = clean.pids()
    doctor = clean.play("doctor.yml").good()
    assert "router" in doctor.text
    clean.play("rebalance.yml", "-e", "ratio=2p1d").good()
    after = clean.pids()
    assert {name: pid for name, pid in before.items() if name in after} == after
    # a certificate that is renewed restarts the router and nobody else
    renewed = certificate(tmp_path, "own", signer=certificate(tmp_path, "ca", ()))
    clean.play("deploy_pd.yml", *words(renewed, ca), "-e", "ratio=2p1d").good()
    assert workers(clean, ca) == 3
    last = clean.pids()
    assert [name for name in last if last[name] != after[name]] == ["pd-router"]
    assert clean.play("deploy_pd.yml", *words(renewed, ca), "-e", "ratio=2p1d").good().changed == {"gh200": 0, "a100": 0}
    # and TLS can go again
    clean.play("deploy_pd.yml").good()
    assert len(clean.ask("/workers")["workers"]) == 4
    assert not list(clean.folder.glob(".pd/state-*/secrets/*"))
