"""The router's certificate: what clients would refuse is refused before a host is touched."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from certificates import Certificate, certificate
from cryptography.hazmat.primitives import serialization
from unit.plans import host, plan

from pdlib import ask, tls
from pdlib.errors import UserError
from pdlib.gateway import Gateway


@pytest.fixture
def mine(tmp_path: Path) -> Certificate:
    return certificate(tmp_path, "router")


def check(cert: object, key: object, ca: object, address: str | None = "127.0.0.1") -> str:
    return tls.check(str(cert), str(key), str(ca), address)


def test_what_clients_trust_is_returned(tmp_path: Path, mine: Certificate) -> None:
    assert check(mine.cert, mine.key, mine.cert) == mine.cert.read_text()
    ca = certificate(tmp_path, "ca", ())
    signed = certificate(tmp_path, "signed", ("10.0.0.1", "fd00::1"), signer=ca)
    for address in ("10.0.0.1", "fd00::1", None):
        assert check(signed.cert, signed.key, ca.cert, address) == ca.cert.read_text()


def test_what_clients_would_refuse_is_said(tmp_path: Path, mine: Certificate) -> None:
    other, old = certificate(tmp_path, "other"), certificate(tmp_path, "old", days=0)
    signed = certificate(tmp_path, "signed", signer=other)
    junk, locked = tmp_path / "junk", tmp_path / "locked"
    junk.write_text("junk")
    hidden = serialization.BestAvailableEncryption(b"word")
    locked.write_bytes(mine.private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden))
    empty, big, none = tmp_path / "empty", tmp_path / "big", tmp_path / "none"
    empty.touch()
    big.write_text("x" * (tls.MOST + 1))
    for cert, key, ca, address, said in (
        (mine.cert, other.key, mine.cert, None, f"router_tls_key={other.key} is not the key of router_tls_cert={mine.cert}"),
        (mine.cert, junk, mine.cert, None, f"router_tls_key={junk} holds no private key in PEM that needs no password"),
        (mine.cert, locked, mine.cert, None, f"router_tls_key={locked} holds no private key in PEM that needs no password"),
        (junk, mine.key, mine.cert, None, f"router_tls_cert={junk} holds no certificate in PEM"),
        (junk, mine.key, junk, None, f"router_tls_cert={junk} holds no certificate in PEM"),
        (mine.cert, mine.key, junk, None, f"router_tls_ca={junk} holds no certificate in PEM"),
        (mine.cert, mine.key, empty, None, f"router_tls_ca={empty} holds no certificate in PEM"),
        (mine.cert, mine.key, big, None, f"router_tls_ca={big} is larger than 64 KiB"),
        (mine.cert, mine.key, none, None, f"router_tls_ca={none}: No such file or directory"),
        (old.cert, old.key, old.cert, None, "refuse it: certificate has expired"),
        (mine.cert, mine.key, other.cert, None, "refuse it: "),
        (signed.cert, signed.key, signed.cert, None, "refuse it: unable to get local issuer certificate"),
        (mine.cert, mine.key, mine.cert, "10.0.0.1", "refuse it: IP address mismatch, certificate is not valid for '10.0.0.1'"),
    ):
        with pytest.raises(UserError) as refused:
            check(cert, key, ca, address)
        assert said in str(refused.value)


@contextmanager
def serving(own: Certificate) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.cert, own.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_clients_trust_the_plans_certificates_and_no_others(tmp_path: Path, mine: Certificate) -> None:
    other = certificate(tmp_path, "other").cert.read_text()
    with serving(mine) as url:
        assert ask.request("GET", url, ca=mine.cert.read_text())[0] == 503
        for ca in ("", other, "junk"):
            status, why = ask.request("GET", url, ca=ca)
            assert (status, bool(why)) == (0, True)
        door = Gateway(url, "k", {"tls_ca": mine.cert.read_text()})
        assert door.converge([], False, False).message == f"waiting for the router at {url}"
        with pytest.raises(UserError, match="shows a certificate that router_tls_ca does not vouch for"):
            Gateway(url, "k", {"tls_ca": other}).converge([], False, False)


TWO = {"n1": host(1), "n2": host(2)}
ON = {"engine": "emulated", "router_tls_cert": "tls/r.pem", "router_tls_key": "tls/r.key"}


def test_the_plan_of_a_router_that_speaks_tls() -> None:
    made = plan(TWO, "1p1d", **ON)
    router = made["router"]
    assert router["url"].startswith("https://")
    assert router["metrics_url"].startswith("http://")
    argv = router["argv"]
    assert argv[argv.index("--tls-cert-path") + 1] == "/var/lib/pd/secrets/router_tls_cert"
    assert argv[argv.index("--tls-key-path") + 1] == "/var/lib/pd/secrets/router_tls_key"
    assert "tls_ca" in router
    without = plan(TWO, "1p1d", engine="emulated")["router"]
    assert without["url"].startswith("http://")
    assert "tls" not in str(without)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"router_tls_key": None}, "router_tls_cert is set, and router_tls_key is not"),
        ({"router_tls_cert": None}, "router_tls_key is set, and router_tls_cert is not"),
        (
            {"router_tls_cert": None, "router_tls_key": None, "router_tls_ca": "ca"},
            "router_tls_ca is set, and router_tls_cert is not",
        ),
        ({"router": "mini-lb", "router_policy": "random"}, "router=mini-lb speaks no TLS: set router to sglang-router or smg"),
        ({"router_args": {"tls-cert-path": "x"}}, "set router_tls_cert instead"),
    ],
)
def test_half_of_it_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as refused:
        plan(TWO, "1p1d", **{**ON, **options})
    assert said in str(refused.value)
