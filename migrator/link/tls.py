"""TLS between the two hosts of a migration: who is let in, and what is offered to them.

Both sides show a certificate of the same CA; :mod:`migrator.link.keys` makes CAs for that. It is
TLS 1.3 (RFC 8446) and nothing older: with it went compression and renegotiation.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from migrator.errors import ConfigError, PeerRefused
from migrator.link.keys import check_owner, check_private, fingerprint, host_name, this_host

_PEM_END = "-----END CERTIFICATE-----"
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Credentials:
    """Who this host is, and whom it believes: three files in PEM, read for each context anew.

    :ivar certificate: of this host; those between it and the CA may follow in the same file
    :ivar key: of that certificate, without a passphrase
    :ivar ca: the only CA that is believed
    """

    certificate: Path
    key: Path
    ca: Path

    def fingerprint(self) -> str:
        """Fingerprint of this host's certificate; see :func:`migrator.link.keys.fingerprint`.

        :raise ConfigError: the file cannot be read
        """
        try:
            first = self.certificate.read_text().partition(_PEM_END)
            return fingerprint(ssl.PEM_cert_to_DER_cert("".join(first[:2]).strip()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot be read: {error}", file=str(self.certificate)) from error

    def server_context(self) -> ssl.SSLContext:
        """For the side that is connected to. Nobody without a certificate of the CA is let in.

        There are no session tickets, so that every connection is authenticated on its own. After
        the handshake, and before a byte of what comes is believed: :func:`check_peer`.

        :raise ConfigError: the files cannot be used
        """
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.num_tickets = 0
        return context

    def client_context(self, peer: str | None = None) -> ssl.SSLContext:
        """For the side that connects.

        The server's certificate has to be good for ``server_hostname``, which must be given to the
        connection; or with a fingerprint as ``peer``, for no name at all. After the handshake, and
        before a byte is sent: :func:`check_peer`, which compares the fingerprint.

        A client of TLS 1.3 is done before the server has looked at its certificate (RFC 8446,
        section 4.4.2): whether the server let it in is known with the first byte that comes back.

        :param peer: see :func:`parse_peer`
        :raise ConfigError: the files cannot be used, or ``peer`` makes no sense
        """
        context = self._context(ssl.PROTOCOL_TLS_CLIENT)
        if peer is not None and _FINGERPRINT.fullmatch(parse_peer(peer)):
            context.check_hostname = False
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
        context.hostname_checks_common_name = False
        check_private(self.key)
        for file in (self.certificate, self.ca):
            check_owner(file)
        try:
            # a passphrase would be asked for at the terminal
            context.load_cert_chain(self.certificate, self.key, password="")
        except OSError as error:
            raise ConfigError(
                f"expected a certificate, and beside it its key without a passphrase: {error}",
                file=str(self.certificate),
            ) from error
        try:
            context.load_verify_locations(self.ca)
        except OSError as error:
            raise ConfigError(f"expected the CA's certificate: {error}", file=str(self.ca)) from (
                error
            )
        return context


def load(directory: Path) -> Credentials:
    """The credentials of this host: ``host.crt``, ``host.key`` and ``ca.crt``.

    :param directory: where they are; or where :func:`migrator.link.keys.init` made those of many
        hosts, this one's among them, in a directory that has its name
    :raise ConfigError: one is missing or cannot be used, another user owns one, or may read the key
    """
    try:
        home = _home(directory)
    except OSError as error:
        raise ConfigError(f"{error.strerror}", file=error.filename) from error
    credentials = Credentials(home / "host.crt", home / "host.key", home / "ca.crt")
    credentials.client_context()
    return credentials


def _home(directory: Path) -> Path:
    home = directory
    if not (home / "host.crt").exists() and not (home / "host.key").exists():
        home = directory / this_host()
        if not home.exists():
            raise ConfigError(
                f"expected host.crt here, or {home.name}/host.crt: on the host that has the CA, "
                f"migrator keys add DIR {home.name} makes them",
                file=str(directory),
            )
    for name in ("host.crt", "host.key", "ca.crt"):
        if not (home / name).exists():
            raise ConfigError(
                "is missing: copy all three, host.crt, host.key and ca.crt, from where migrator "
                "keys made them",
                file=str(home / name),
            )
    return home


def parse_peer(text: str) -> str:
    """Whom somebody wants at the other end: a host, or ``sha256:`` and 64 hexadecimal digits.

    :return: a host as :func:`migrator.link.keys.host_name` has it; or a fingerprint, in lower case
    and
        without the colons that ``openssl x509 -fingerprint`` puts between bytes
    :raise ConfigError: it is neither
    """
    kind, colon, digits = text.lower().partition(":")
    if kind != "sha256":
        return host_name(text)
    wanted = kind + colon + digits.replace(":", "")
    if not _FINGERPRINT.fullmatch(wanted):
        raise ConfigError(f"expected sha256: and 64 hexadecimal digits, not {text!r}")
    return wanted


def check_peer(connection: ssl.SSLObject | ssl.SSLSocket, peer: str | None) -> None:
    """Is it the wanted host at the other end? To be asked between handshake and data.

    Names are compared as a whole and without regard to case, addresses as addresses; a wildcard in
    a certificate means nothing.

    :param connection: whose handshake is over
    :param peer: see :func:`parse_peer`; ``None`` wants any host with a certificate of the CA
    :raise PeerRefused: it is another, or none that showed a certificate
    :raise ConfigError: ``peer`` makes no sense
    """
    wanted = "a host with a certificate" if peer is None else parse_peer(peer)
    certificate = connection.getpeercert(binary_form=True)
    if certificate is None:
        raise PeerRefused("somebody without a certificate", wanted)
    if peer is None:
        return
    shown = fingerprint(certificate)
    names = list(_names(connection))
    if wanted not in (shown, *names):
        raise PeerRefused(f"{', '.join(names) or 'a host without a name'} ({shown})", wanted)


def _names(connection: ssl.SSLObject | ssl.SSLSocket) -> Iterator[str]:
    """The hosts that the other side's certificate is good for, as ``host_name`` has them."""
    alternatives = (connection.getpeercert() or {}).get("subjectAltName", ())
    for kind, value in cast("tuple[tuple[str, str], ...]", alternatives):
        if kind == "DNS":
            yield value.lower()
        elif kind == "IP Address":
            try:
                yield str(ipaddress.ip_address(value))
            except ValueError:  # OpenSSL writes <invalid> for what has neither 4 nor 16 bytes
                continue
