"""The router's certificate, tried on the controller before a host is touched: what clients will say to it is said here first."""

from __future__ import annotations

import ssl
from typing import Optional

from .errors import UserError

#: Bytes of the certificates that clients verify with: they stand in the plan.
MOST = 64 * 1024


def trusting(ca: str) -> ssl.SSLContext:
    """Return a client's context that trusts these certificates (PEM) and no others."""
    return ssl.create_default_context(cadata=ca)


def check(cert: str, key: str, ca: str, address: Optional[str]) -> str:
    """Return the text of the file ``ca``, with which clients verify a server that has ``cert`` and ``key`` (files, PEM).

    ``address``: what they ask for, None where it is not known yet. Raises UserError with what they would refuse.
    """
    try:
        with open(ca, encoding="ascii") as file:
            text = file.read(MOST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"router_tls_ca={ca}: {getattr(error, 'strerror', None) or 'it is not PEM'}") from None
    if len(text) > MOST:
        raise UserError(f"router_tls_ca={ca} is larger than {MOST // 1024} KiB: give the one CA that the certificate is from")
    try:
        # An empty text would mean the system's certificates.
        client = trusting(text.strip() or "none")
        ssl.create_default_context(cafile=cert)
    except (OSError, ValueError):
        raise UserError(f"{_which(cert, ca)} holds no certificate in PEM") from None
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password it would ask for one at the terminal.
        server.load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ValueError) as error:
        if "KEY_VALUES_MISMATCH" in str(error):
            raise UserError(f"router_tls_key={key} is not the key of router_tls_cert={cert}") from None
        raise UserError(f"router_tls_key={key} holds no private key in PEM that needs no password") from None
    refused = _handshake(server, client, address)
    if refused:
        raise UserError(f"router_tls_cert={cert}: clients that trust {ca} refuse it: {refused}")
    return text


def _which(cert: str, ca: str) -> str:
    try:
        ssl.create_default_context(cafile=cert)
    except (OSError, ValueError):
        return f"router_tls_cert={cert}"
    return f"router_tls_ca={ca}"


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, address: Optional[str]) -> str:
    """Let both meet in memory; return why the client refuses the server, "" when it does not."""
    client.check_hostname = address is not None
    # What Python 3.13 adds on the controller (partial chains) older ones on the hosts have not.
    client.verify_flags &= ~getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=address),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(10):
        for end in list(ends):
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return error.verify_message
            except (ssl.SSLError, ssl.CertificateError) as error:
                return str(error)
        if not ends:
            return ""
    return "the handshake does not end"
