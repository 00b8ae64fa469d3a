"""A certificate authority of one's own, and a certificate for each host that VMs move between.

::

    DIRECTORY/ca.key                          whoever has it can make hosts: it stays where it is
    DIRECTORY/ca.crt
    DIRECTORY/HOST/{ca.crt,host.crt,host.key}      what goes to HOST, as it is

All are PEM (RFC 7468), keys are PKCS #8. What is in the certificates:
:mod:`migrator.link.certificates`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from migrator.errors import ConfigError
from migrator.link.certificates import CA_DAYS, Authority, ca_certificate, host_certificate

HOST_DAYS = 825
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1123, section 2.1
_NAME_LENGTH = 253


@dataclass(frozen=True)
class Certificate:
    """What a certificate says.

    :ivar file: where it is
    :ivar subject: as RFC 4514 writes it
    :ivar names: DNS names and addresses it is good for
    :ivar fingerprint: see :func:`fingerprint`
    :ivar not_before: first second of its validity, UTC
    :ivar not_after: last second of its validity, UTC
    """

    file: Path
    subject: str
    names: tuple[str, ...]
    fingerprint: str
    not_before: datetime
    not_after: datetime


def init(directory: Path, hosts: Sequence[str], days: int = HOST_DAYS) -> list[Path]:
    """Make a CA and a certificate for each host.

    :param directory: is made, with mode 0700, or may be there already
    :param hosts: see :func:`host_name`
    :param days: validity of the hosts' certificates; the CA's is ten years
    :return: the files that were made
    :raise ConfigError: they make no sense, something is there already (nothing is overwritten),
        a file cannot be made, or another user owns or may write to the directory
    """
    now = _now()
    try:
        names = _checked(directory, hosts, days)
        directory.mkdir(mode=0o700, exist_ok=True)
        _check_directory(directory)
        key = ec.generate_private_key(ec.SECP256R1())
        authority = Authority(ca_certificate(key, now), key)
        made = [directory / "ca.key", directory / "ca.crt"]
        _write(made[0], _key_pem(key), 0o600)
        _write(made[1], _pem(authority.certificate), 0o644)
        for host in names:
            made += _make_host(directory, authority, host, now, days)
    except OSError as error:
        raise _in_words(error, directory) from error
    return made


def add(directory: Path, hosts: Sequence[str], days: int = HOST_DAYS) -> list[Path]:
    """Make certificates for more hosts, by the CA that :func:`init` made.

    :raise ConfigError: as for :func:`init`; or there is no CA, it cannot be used, or its own
        certificate ends earlier
    """
    now = _now()
    made = []
    try:
        names = _checked(directory, hosts, days)
        if directory.exists():
            _check_directory(directory)
        authority = _load_authority(directory)
        end = authority.certificate.not_valid_after_utc
        if now + timedelta(days=days) > end:
            raise ConfigError(
                f"the CA ends on {end:%Y-%m-%d}, before {days} days are over: ask for fewer days, "
                "or make another CA in another directory",
                file=str(directory / "ca.crt"),
            )
        for host in names:
            made += _make_host(directory, authority, host, now, days)
    except OSError as error:
        raise _in_words(error, directory) from error
    return made


def show(directory: Path) -> list[Certificate]:
    """What the certificates of a CA's directory say, or those of a host's.

    :raise ConfigError: there is none, or one cannot be read
    """
    try:
        homes = [directory, *sorted(directory.iterdir())]
        possible = [directory / "ca.crt", *(home / "host.crt" for home in homes)]
        files = [file for file in possible if file.exists()]
    except OSError as error:
        raise _in_words(error, directory) from error
    if not files:
        raise ConfigError("no certificates: migrator keys init makes them", file=str(directory))
    return [_described(file) for file in files]


def fingerprint(certificate_der: bytes) -> str:
    """``sha256:`` and the SHA-256 of a whole certificate, 64 hexadecimal digits.

    :param certificate_der: as ``getpeercert(binary_form=True)`` returns it
    """
    return f"sha256:{hashlib.sha256(certificate_der).hexdigest()}"


def host_name(text: str) -> str:
    """A host as its certificate and its directory have it: lower case, addresses shortened.

    :raise ConfigError: it is neither a DNS name (RFC 1123) nor an address
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        pass
    else:
        if "%" not in text:  # a zone means something on one host only
            return str(address)
    name = text.lower()
    labels = name.split(".")
    mistyped_address = len(labels) > 1 and labels[-1].isdecimal()
    if len(name) > _NAME_LENGTH or mistyped_address or not all(map(_LABEL.fullmatch, labels)):
        raise ConfigError(f"expected the name or the address of a host, not {text!r}")
    return name


def this_host() -> str:
    """The name of this host, as :func:`host_name` has it.

    :raise ConfigError: the kernel has none that can be used
    """
    return host_name(socket.gethostname())


def check_private(key: Path) -> None:
    """Only this user, or root, owns a key, and only its owner may read it.

    :raise ConfigError: another user owns it or may read it, or it is not there
    """
    try:
        found = key.stat()
    except OSError as error:
        raise ConfigError(f"{error.strerror}", file=str(key)) from error
    check_owner(key)
    mode = found.st_mode
    if mode & 0o077:
        raise ConfigError(
            f"others may use this key (its mode is {stat.S_IMODE(mode):04o}): if none can have "
            "read it, chmod 600; else make another",
            file=str(key),
        )


def check_owner(path: Path) -> None:
    """Only this user, or root, owns a file or directory: its owner can read and replace it.

    :raise ConfigError: another user owns it, or it is not there
    """
    try:
        owner = path.stat().st_uid
    except OSError as error:
        raise ConfigError(f"{error.strerror}", file=str(path)) from error
    if owner not in (0, os.geteuid()):
        raise ConfigError(
            f"belongs to another user (its owner has the number {owner}), and not to root "
            "or the user that runs this program: that user can read and replace keys here",
            file=str(path),
        )


def _check_directory(directory: Path) -> None:
    check_owner(directory)
    if directory.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError("others may write to it: chmod go-w", file=str(directory))


# -- making -------------------------------------------------------------------------------------


def _checked(directory: Path, hosts: Sequence[str], days: int) -> list[str]:
    if not 1 <= days <= CA_DAYS:
        raise ConfigError(f"expected 1 to {CA_DAYS} days, not {days}")
    names = list(dict.fromkeys(map(host_name, hosts)))
    for name in names:
        if (directory / name).exists():
            raise _there_already(directory / name)
    return names


def _now() -> datetime:
    """The present, as exact as a certificate can say it."""
    return datetime.now(timezone.utc).replace(microsecond=0)


# -- files --------------------------------------------------------------------------------------


def _make_host(
    directory: Path, authority: Authority, host: str, now: datetime, days: int
) -> list[Path]:
    """All of a host's files, or none: they are made beside, and renamed."""
    home = directory / host
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = host_certificate(authority, key.public_key(), host, now, days)
    beside = Path(tempfile.mkdtemp(prefix=".making-", dir=directory))
    try:
        _write(beside / "ca.crt", _pem(authority.certificate), 0o644)
        _write(beside / "host.crt", _pem(certificate), 0o644)
        _write(beside / "host.key", _key_pem(key), 0o600)
        beside.rename(home)  # fails if there is anything in its way
    except BaseException:
        shutil.rmtree(beside)
        raise
    return [home / name for name in ("ca.crt", "host.crt", "host.key")]


def _write(path: Path, content: bytes, mode: int) -> None:
    """A new file that has its mode from the beginning."""
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _there_already(path: Path) -> ConfigError:
    return ConfigError("is there already, and nothing is overwritten", file=str(path))


def _in_words(error: OSError, directory: Path) -> ConfigError:
    place = Path(error.filename2 or error.filename or directory)
    if isinstance(error, FileExistsError):
        return _there_already(place)
    return ConfigError(f"{error.strerror}", file=str(place))


def _load_authority(directory: Path) -> Authority:
    certificate_file, key_file = directory / "ca.crt", directory / "ca.key"
    if not key_file.exists():
        raise ConfigError("no CA here: migrator keys init makes one", file=str(directory))
    check_private(key_file)
    certificate = _read(certificate_file)
    try:
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"expected a key in PEM: {error}", file=str(key_file)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != (
        certificate.public_key()
    ):
        raise ConfigError("is not the key of ca.crt beside it", file=str(key_file))
    return Authority(certificate, key)


def _read(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected a certificate in PEM: {error}", file=str(file)) from error


def _described(file: Path) -> Certificate:
    certificate = _read(file)
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = (
            *found.get_values_for_type(x509.DNSName),
            *map(str, found.get_values_for_type(x509.IPAddress)),
        )
    except x509.ExtensionNotFound:
        names = ()
    return Certificate(
        file,
        certificate.subject.rfc4514_string(),
        names,
        fingerprint(certificate.public_bytes(serialization.Encoding.DER)),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )
