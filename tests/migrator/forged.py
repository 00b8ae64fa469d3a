"""Certificates that must not be let in, made with the keys that a forger could have."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrator.link.tls import Credentials

BOTH = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
DAY = timedelta(days=1)


@dataclass(frozen=True)
class Signer:
    """Who signs: a CA or, wrongly, a host. ``chain`` is what leads from its signatures to a CA."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    chain: tuple[x509.Certificate, ...] = ()


def signer(certificate: Path, key: Path, *, host: bool = False) -> Signer:
    """One whose files somebody has."""
    loaded = x509.load_pem_x509_certificate(certificate.read_bytes())
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    return Signer(loaded, private, (loaded,) if host else ())


def make(
    by: Signer | None,
    name: str,
    *,
    ca: bool = False,
    alternatives: Sequence[str] = (),
    usages: Sequence[x509.ObjectIdentifier] = BOTH,
    begins: timedelta = -DAY,
    ends: timedelta = DAY,
) -> Signer:
    """A certificate and its key.

    :param by: who signs; ``None``: it signs itself
    :param begins: from now, as ``ends``
    """
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, issuer_key = (subject, key) if by is None else (by.certificate.subject, by.key)
    now = datetime.now(timezone.utc)
    builder = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if ca:
        usage = x509.KeyUsage(
            *(False, False, False, False, False), key_cert_sign=True, crl_sign=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = builder.add_extension(usage, critical=True)
    else:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    if alternatives:
        names = x509.SubjectAlternativeName([_general(text) for text in alternatives])
        builder = builder.add_extension(names, critical=False)
    certificate = builder.sign(issuer_key, hashes.SHA256())
    above = by.chain if by else ()
    return Signer(certificate, key, (certificate, *above) if by else ())


def files(home: Path, forged: Signer, ca: Path) -> Credentials:
    """Files of a host that shows ``forged`` and what leads to its CA, and believes ``ca``."""
    home.mkdir()
    chain = forged.chain or (forged.certificate,)
    (home / "host.crt").write_bytes(
        b"".join(c.public_bytes(serialization.Encoding.PEM) for c in chain)
    )
    (home / "host.key").touch(0o600)
    (home / "host.key").write_bytes(
        forged.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return Credentials(home / "host.crt", home / "host.key", ca)


def _general(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
