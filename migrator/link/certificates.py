"""The certificates themselves: what is in those that :mod:`migrator.link.keys` makes.

X.509 as in RFC 5280: ECDSA over P-256 with SHA-256. A host is known by its subject alternative
names alone (RFC 9525, section 6.3), never by the subject's common name.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS = 3650
SKEW = timedelta(minutes=5)
"""How far back a certificate begins, for hosts whose clocks are behind."""

CA_NAME = "qemu-migrator CA"
_COMMON_NAME_LENGTH = 64  # RFC 5280, appendix A.1, ub-common-name


@dataclass(frozen=True)
class Authority:
    """A CA that can certify."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def ca_certificate(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    """A CA that certifies hosts and no other CAs, for ten years."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, CA_NAME)])
    return (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def host_certificate(
    authority: Authority, public: ec.EllipticCurvePublicKey, host: str, now: datetime, days: int
) -> x509.Certificate:
    """A host that may be client and server.

    :param host: as :func:`migrator.link.keys.host_name` has it; all of it is in the alternative
        names
    """
    issuer = authority.certificate
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:_COMMON_NAME_LENGTH])])
    return (
        x509.CertificateBuilder(issuer.subject, subject, public, x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName([_general_name(host)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
        .sign(authority.key, hashes.SHA256())
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, key_cert_sign: bool = False, digital_signature: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
