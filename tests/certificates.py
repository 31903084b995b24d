"""Certificates for tests: one that is its own CA, or one that a CA of the test's has signed."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Certificate:
    """Files in PEM (the key's mode is 0600), and what signs others with it."""

    cert: Path
    key: Path
    made: x509.Certificate
    private: ec.EllipticCurvePrivateKey


def certificate(
    folder: Path, name: str, addresses: tuple[str, ...] = ("127.0.0.1",), days: int = 2, signer: Certificate | None = None
) -> Certificate:
    """Make one that is valid from yesterday for ``days`` days; without a ``signer`` it is its own CA."""
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    issuer, issuer_key = (signer.made, signer.private) if signer else (None, private)
    own = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False
    )
    names = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=signer is None, crl_sign=signer is None, **usage), critical=True
        )
        .add_extension(own, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    # OpenSSL's strict mode, which Python 3.13 takes, refuses one that is there and empty.
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False) if names else builder
    made = builder.sign(issuer_key, hashes.SHA256())
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    cert.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    key.touch(mode=0o600)
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return Certificate(cert, key, made, private)
