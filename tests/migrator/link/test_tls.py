"""Who is let in. The other end is OpenSSL's command, with whatever it was given to show.

Each refusal is for its reason, and the same exchange with the right certificate goes through.
"""

from __future__ import annotations

import asyncio
import os
import pty
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from migrator.errors import ConfigError, PeerRefused
from migrator.link import keys
from migrator.link.tls import Credentials, check_peer, load, parse_peer
from tests.migrator.forged import DAY, files, make, signer

LOOPBACK = "127.0.0.1"
DEADLINE_S = 30.0
SECRET = b"guest pages\n"
GREETING = b"hello from the server\n"
A, B = "hosta.example", "hostb.example"


@dataclass(frozen=True)
class Place:
    """What a CA has made for two hosts, and room for forgeries."""

    home: Path

    @property
    def ca(self) -> Path:
        return self.home / "ca.crt"

    def of(self, host: str) -> Credentials:
        return load(self.home / host)

    def fingerprint(self, host: str) -> str:
        pem = (self.home / host / "host.crt").read_text()
        return keys.fingerprint(ssl.PEM_cert_to_DER_cert(pem))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    home = tmp_path_factory.mktemp("tls") / "ca"
    keys.init(home, [A, B, LOOPBACK, "fd00::2"])
    return Place(home)


# -- both ends ----------------------------------------------------------------------------------


@dataclass
class Server:
    """Ours, for one connection: what it let through, and what it said against the rest."""

    context: ssl.SSLContext
    peer: str | None = None
    received: bytes = b""
    error: Exception | None = None
    listener: socket.socket = field(default_factory=lambda: socket.create_server((LOOPBACK, 0)))

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def serve(self) -> None:
        self.listener.settimeout(DEADLINE_S)
        try:
            plain, _ = self.listener.accept()
            plain.settimeout(DEADLINE_S)
            with plain, self.context.wrap_socket(plain, server_side=True) as connection:
                check_peer(connection, self.peer)
                connection.sendall(GREETING)
                self.received = connection.recv(1 << 16)
        except (OSError, PeerRefused) as error:
            self.error = error

    def said(self) -> str:
        return str(self.error)


@contextmanager
def serving(context: ssl.SSLContext, peer: str | None = None) -> Iterator[Server]:
    """When it ends, the server has dealt with its one connection."""
    server = Server(context, peer)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        thread.join()
        server.listener.close()


def shown(credentials: Credentials) -> list[str]:
    certificate = str(credentials.certificate)
    arguments = ["-cert", certificate, "-key", str(credentials.key), "-cert_chain", certificate]
    return [*arguments, "-CAfile", str(credentials.ca)]


def s_client(port: int, *arguments: str) -> bytes:
    """OpenSSL's client sends the secret, whatever it thinks of the server.

    :return: what the server let it see
    """
    command = ["openssl", "s_client", "-quiet", "-connect", f"{LOOPBACK}:{port}", *arguments]
    done = subprocess.run(
        command, input=SECRET, capture_output=True, timeout=DEADLINE_S, check=False
    )
    return done.stdout


@contextmanager
def s_server(credentials: Credentials, *arguments: str) -> Iterator[tuple[int, list[bytes]]]:
    """OpenSSL's server greets whoever is let in.

    :return: its port; and its output, once it ends
    """
    command = ["openssl", "s_server", "-accept", f"{LOOPBACK}:0", "-naccept", "1"]
    output: list[bytes] = []
    standard_input, greeting = os.pipe()  # stays open: at its end the server would read no more
    with (
        open(standard_input, "rb") as stdin,
        open(greeting, "wb", buffering=0) as say,
        subprocess.Popen(
            [*command, "-Verify", "1", "-verify_return_error", *shown(credentials), *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                output.append(line)
                if found := re.match(rb"ACCEPT .*:(\d+)$", line.rstrip()):
                    break
            else:
                pytest.fail(b"".join(output).decode())
            say.write(GREETING)
            yield int(found[1]), output
            output.append(process.communicate(timeout=DEADLINE_S)[0])
        finally:
            process.kill()


def connect(
    context: ssl.SSLContext, port: int, host: str, peer: str | None = None
) -> tuple[bytes, ssl.SSLSession | None]:
    """As a migration does: handshake, the peer, then data.

    :return: what came back, and the session as it is then
    """
    plain = socket.create_connection((LOOPBACK, port), DEADLINE_S)
    with plain, context.wrap_socket(plain, server_hostname=host) as connection:
        check_peer(connection, peer)
        connection.sendall(SECRET)
        return connection.recv(1 << 16), connection.session


# -- the right one ------------------------------------------------------------------------------


def peers(place: Place, host: str) -> list[str | None]:
    pin = place.fingerprint(host)
    with_colons = pin[7:9] + "".join(f":{pin[i : i + 2]}" for i in range(9, len(pin), 2))
    return [None, host, host.upper(), pin, f"SHA256:{with_colons.upper()}"]


@pytest.mark.parametrize("host", [A, LOOPBACK, "fd00::2"])
@pytest.mark.parametrize("which", range(5))
def test_the_right_client_is_let_in(place: Place, host: str, which: int) -> None:
    with serving(place.of(B).server_context(), peers(place, host)[which]) as server:
        seen = s_client(server.port, *shown(place.of(host)))
    assert (server.error, server.received, seen) == (None, SECRET, GREETING)


@pytest.mark.parametrize("host", [B, LOOPBACK, "fd00::2"])
@pytest.mark.parametrize("which", range(5))
def test_the_right_server_is_trusted(place: Place, host: str, which: int) -> None:
    peer = peers(place, host)[which]
    with s_server(place.of(host)) as (port, output):
        seen, _ = connect(place.of(A).client_context(peer), port, host, peer)
    assert seen == GREETING
    assert SECRET in b"".join(output)


def test_both_ends_are_ours(place: Place) -> None:
    with serving(place.of(B).server_context(), A) as server:
        seen, _ = connect(place.of(A).client_context(), server.port, B, B)
    assert (server.error, server.received, seen) == (None, SECRET, GREETING)


def test_over_asyncio(place: Place) -> None:
    """Its connections are SSLObjects."""
    refused: list[object] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("ssl_object")
        try:
            check_peer(connection, place.fingerprint(B))
        except PeerRefused as error:
            refused.append(error.peer)
        check_peer(connection, A)
        writer.write(await reader.readline())
        writer.close()

    async def exchange() -> bytes:
        context = place.of(B).server_context()
        async with await asyncio.start_server(serve, LOOPBACK, 0, ssl=context) as server:
            reader, writer = await asyncio.open_connection(
                *server.sockets[0].getsockname(),
                ssl=place.of(A).client_context(),
                server_hostname=B,
            )
            check_peer(writer.get_extra_info("ssl_object"), B)
            writer.write(SECRET)
            echoed = await asyncio.wait_for(reader.read(), DEADLINE_S)
            writer.close()
            await writer.wait_closed()
            return echoed

    assert asyncio.run(exchange()) == SECRET
    assert refused == [f"{A} ({place.fingerprint(A)})"]


# -- the wrong ones -----------------------------------------------------------------------------


def of_another_ca(place: Place, home: Path) -> Credentials:
    other = make(None, "another CA", ca=True)
    return files(home, make(other, A, alternatives=[A, B]), place.ca)


def of_a_ca_with_the_same_name(place: Place, home: Path) -> Credentials:
    other = make(None, "qemu-migrator CA", ca=True)
    return files(home, make(other, A, alternatives=[A, B]), place.ca)


def signed_by_itself(place: Place, home: Path) -> Credentials:
    return files(home, make(None, A, alternatives=[A, B]), place.ca)


def expired(place: Place, home: Path) -> Credentials:
    ours = signer(place.ca, place.home / "ca.key")
    forged = make(ours, A, alternatives=[A, B], begins=-2 * DAY, ends=timedelta(minutes=-1))
    return files(home, forged, place.ca)


def not_yet_valid(place: Place, home: Path) -> Credentials:
    ours = signer(place.ca, place.home / "ca.key")
    forged = make(ours, A, alternatives=[A, B], begins=timedelta(hours=1), ends=2 * DAY)
    return files(home, forged, place.ca)


def signed_by_a_host(place: Place, home: Path) -> Credentials:
    host = signer(place.home / A / "host.crt", place.home / A / "host.key", host=True)
    return files(home, make(host, B, alternatives=[A, B]), place.ca)


def signed_by_a_ca_below_ours(place: Place, home: Path) -> Credentials:
    below = make(signer(place.ca, place.home / "ca.key"), "a CA below", ca=True)
    return files(home, make(below, B, alternatives=[A, B]), place.ca)


def for_something_else(place: Place, home: Path) -> Credentials:
    ours = signer(place.ca, place.home / "ca.key")
    forged = make(ours, A, alternatives=[A, B], usages=[ExtendedKeyUsageOID.CODE_SIGNING])
    return files(home, forged, place.ca)


WRONG: list[tuple[Callable[[Place, Path], Credentials], str]] = [
    (of_another_ca, "unable to get local issuer certificate"),
    (of_a_ca_with_the_same_name, "unable to get local issuer certificate"),
    (signed_by_itself, "self-signed certificate"),
    (expired, "certificate has expired"),
    (not_yet_valid, "certificate is not yet valid"),
    (signed_by_a_host, "invalid CA certificate"),
    (signed_by_a_ca_below_ours, "path length constraint exceeded"),
    (for_something_else, "(unsupported|unsuitable) certificate purpose"),
]
wrong_ones = pytest.mark.parametrize(
    ("wrong", "why"), WRONG, ids=lambda x: getattr(x, "__name__", "")
)


@wrong_ones
def test_wrong_clients_are_refused(
    place: Place, tmp_path: Path, wrong: Callable[[Place, Path], Credentials], why: str
) -> None:
    credentials = wrong(place, tmp_path / "forged")
    with serving(place.of(B).server_context()) as server:
        seen = s_client(server.port, *shown(credentials))
    assert re.search(why, server.said())
    assert (server.received, seen) == (b"", b"")


@wrong_ones
def test_wrong_servers_are_refused(
    place: Place, tmp_path: Path, wrong: Callable[[Place, Path], Credentials], why: str
) -> None:
    credentials = wrong(place, tmp_path / "forged")
    with s_server(credentials) as (port, output), pytest.raises(ssl.SSLError, match=why):
        connect(place.of(A).client_context(), port, B)
    assert SECRET not in b"".join(output)


@wrong_ones
def test_a_fingerprint_does_not_replace_the_ca(
    place: Place, tmp_path: Path, wrong: Callable[[Place, Path], Credentials], why: str
) -> None:
    credentials = wrong(place, tmp_path / "forged")
    pem = credentials.certificate.read_text().split("-----END")[0] + "-----END CERTIFICATE-----"
    pin = keys.fingerprint(ssl.PEM_cert_to_DER_cert(pem))
    with s_server(credentials) as (port, output), pytest.raises(ssl.SSLError, match=why):
        connect(place.of(A).client_context(pin), port, B, pin)
    assert SECRET not in b"".join(output)


def test_a_client_without_a_certificate_is_refused(place: Place) -> None:
    with serving(place.of(B).server_context()) as server:
        seen = s_client(server.port, "-CAfile", str(place.ca))
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in server.said()
    assert (server.received, seen) == (b"", b"")


def test_where_none_was_asked_for_its_absence_is_noticed(place: Place) -> None:
    """Two locks: this is the one behind CERT_REQUIRED."""
    context = place.of(B).server_context()
    context.verify_mode = ssl.CERT_NONE
    with serving(context) as server:
        seen = s_client(server.port, "-CAfile", str(place.ca))
    assert "somebody without a certificate" in server.said()
    assert (server.received, seen) == (b"", b"")


@pytest.mark.parametrize("peer", [B, "hosta", "example", LOOPBACK, "fd00::2", "sha256:" + "0" * 64])
def test_a_client_that_is_another_is_refused(place: Place, peer: str) -> None:
    with serving(place.of(B).server_context(), peer) as server:
        seen = s_client(server.port, *shown(place.of(A)))
    assert isinstance(server.error, PeerRefused)
    assert (server.error.wanted, server.error.exit_code) == (peer, 1)
    assert server.error.peer == f"{A} ({place.fingerprint(A)})"
    assert (server.received, seen) == (b"", b"")


@pytest.mark.parametrize("host", ["hosta.example", "hostb", "example", LOOPBACK, "fd00::2"])
def test_a_server_that_is_another_is_refused(place: Place, host: str) -> None:
    with (
        s_server(place.of(B)) as (port, output),
        pytest.raises(ssl.SSLCertVerificationError, match="mismatch"),
    ):
        connect(place.of(A).client_context(), port, host)
    assert SECRET not in b"".join(output)


def test_a_right_name_does_not_replace_the_fingerprint(place: Place) -> None:
    pin = place.fingerprint(A)
    with s_server(place.of(B)) as (port, output), pytest.raises(PeerRefused, match=pin):
        connect(place.of(A).client_context(pin), port, B, pin)
    assert SECRET not in b"".join(output)


def test_the_right_fingerprint_replaces_the_name(place: Place) -> None:
    pin = place.fingerprint(B)
    with s_server(place.of(B)) as (port, output):
        seen, _ = connect(place.of(A).client_context(pin), port, "another.example", pin)
    assert seen == GREETING
    assert SECRET in b"".join(output)


def test_a_common_name_is_not_a_name(place: Place, tmp_path: Path) -> None:
    ours = signer(place.ca, place.home / "ca.key")
    credentials = files(tmp_path / "forged", make(ours, B), place.ca)
    with s_server(credentials) as (port, output), pytest.raises(ssl.SSLError, match="mismatch"):
        connect(place.of(A).client_context(), port, B)
    assert SECRET not in b"".join(output)
    with serving(place.of(A).server_context(), B) as server:
        seen = s_client(server.port, *shown(credentials))
    assert isinstance(server.error, PeerRefused)
    assert "a host without a name (sha256:" in server.error.peer
    assert (server.received, seen) == (b"", b"")


@pytest.mark.parametrize(
    ("name", "let_in"),
    [("*.lab.example", False), ("HostB.Lab.Example", True), ("hostb.lab.example", True)],
)
def test_names_are_whole_and_of_any_case(
    place: Place, tmp_path: Path, name: str, let_in: bool
) -> None:
    """OpenSSL itself would take the wildcard."""
    host = "hostb.lab.example"
    ours = signer(place.ca, place.home / "ca.key")
    credentials = files(tmp_path / "some", make(ours, host, alternatives=[name]), place.ca)
    with ExitStack() as stack:
        port, output = stack.enter_context(s_server(credentials))
        if not let_in:
            stack.enter_context(pytest.raises(PeerRefused, match=re.escape(name)))
        assert connect(place.of(A).client_context(), port, host, host)[0] == GREETING
    assert (SECRET in b"".join(output)) is let_in
    with serving(place.of(A).server_context(), host) as server:
        seen = s_client(server.port, *shown(credentials))
    assert isinstance(server.error, PeerRefused) is not let_in
    assert (server.received, seen) == ((SECRET, GREETING) if let_in else (b"", b""))


def test_no_other_roots_are_believed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even those that the environment makes every other program believe."""
    other = make(None, "another CA", ca=True)
    root = files(tmp_path / "root", other, place.ca).certificate
    credentials = files(tmp_path / "forged", make(other, B, alternatives=[B]), place.ca)
    monkeypatch.setenv("SSL_CERT_FILE", str(root))
    everybody = ssl.create_default_context()
    everybody.load_cert_chain(place.of(A).certificate, place.of(A).key)
    with s_server(credentials) as (port, _):
        assert connect(everybody, port, B)[0] == GREETING
    ours = place.of(A).client_context()
    with s_server(credentials) as (port, _), pytest.raises(ssl.SSLError, match="local issuer"):
        connect(ours, port, B)
    assert [root["subject"] for root in ours.get_ca_certs()] == [
        ((("commonName", "qemu-migrator CA"),),)
    ]


# -- the wrong protocol -------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "let_in"), [("-tls1_2", False), ("-tls1_3", True)])
def test_nothing_older_than_tls_1_3(place: Place, version: str, let_in: bool) -> None:
    with serving(place.of(B).server_context()) as server:
        seen = s_client(server.port, version, *shown(place.of(A)))
    assert (server.received, seen) == ((SECRET, GREETING) if let_in else (b"", b""))
    assert ("UNSUPPORTED_PROTOCOL" in server.said()) is not let_in
    with ExitStack() as stack:
        port, output = stack.enter_context(s_server(place.of(B), version))
        if not let_in:
            stack.enter_context(pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"))
        assert connect(place.of(A).client_context(), port, B)[0] == GREETING
    assert (SECRET in b"".join(output)) is let_in


def test_plain_text_is_refused_by_the_server(place: Place) -> None:
    with (
        serving(place.of(B).server_context()) as server,
        socket.create_connection((LOOPBACK, server.port), DEADLINE_S) as plain,
    ):
        plain.sendall(SECRET * 1000)
        seen = _all(plain)
    assert isinstance(server.error, ssl.SSLError)
    assert server.received == b""
    assert GREETING not in seen


def _all(plain: socket.socket) -> bytes:
    seen = b""
    try:
        while part := plain.recv(1 << 16):
            seen += part
    except ConnectionResetError:
        pass
    return seen


def test_plain_text_is_refused_by_the_client(place: Place) -> None:
    sent: list[bytes] = []
    with socket.create_server((LOOPBACK, 0)) as listener:

        def greet() -> None:
            plain, _ = listener.accept()
            with plain:
                plain.settimeout(DEADLINE_S)
                plain.sendall(GREETING * 1000)
                sent.append(_all(plain))

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ssl.SSLError):
            connect(place.of(A).client_context(), listener.getsockname()[1], B)
        thread.join()
    assert sent[0][:1] == b"\x16"  # a handshake (RFC 8446, section 5.1)
    assert SECRET not in sent[0]


@pytest.mark.parametrize("tickets", [0, 2])
def test_sessions_are_not_resumed(place: Place, tickets: int) -> None:
    context = place.of(B).server_context()
    if tickets:  # what Python does unless told otherwise
        context.num_tickets = tickets
    with serving(context) as server:
        _, session = connect(place.of(A).client_context(), server.port, B)
    assert session is not None
    assert session.has_ticket is bool(tickets)


# -- files --------------------------------------------------------------------------------------


def test_credentials_are_found_by_the_name_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.init(tmp_path / "ca", ["hosta", "hostb"])
    monkeypatch.setattr("socket.gethostname", lambda: "HostB")
    found = load(tmp_path / "ca")
    assert found == load(tmp_path / "ca" / "hostb")
    assert found.certificate == tmp_path / "ca" / "hostb" / "host.crt"
    monkeypatch.setattr("socket.gethostname", lambda: "hostc")
    with pytest.raises(ConfigError, match=r"hostc/host\.crt.*migrator keys add DIR hostc"):
        load(tmp_path / "ca")


@pytest.mark.parametrize("name", ["host.crt", "host.key", "ca.crt"])
def test_files_that_are_missing_or_nonsense(tmp_path: Path, name: str) -> None:
    home = tmp_path / "ca" / "hosta"
    keys.init(tmp_path / "ca", ["hosta"])
    (home / name).write_text("nonsense")
    with pytest.raises(ConfigError, match=r"hosta/(host|ca)\.crt: expected"):
        load(home)
    (home / name).unlink()
    with pytest.raises(ConfigError, match=rf"{home / name}: is missing: copy all three"):
        load(home)


def test_a_key_that_belongs_to_another_certificate(tmp_path: Path) -> None:
    keys.init(tmp_path / "ca", ["hosta", "hostb"])
    (tmp_path / "ca/hosta/host.key").replace(tmp_path / "ca/hostb/host.key")
    with pytest.raises(ConfigError, match="beside it its key"):
        load(tmp_path / "ca/hostb")


def test_a_key_with_a_passphrase_is_not_asked_for(tmp_path: Path) -> None:
    """Nobody sits at a migration's terminal."""
    keys.init(tmp_path / "ca", ["hosta"])
    key = tmp_path / "ca/hosta/host.key"
    plain, locked = str(key), str(tmp_path / "locked")
    command = ["openssl", "pkey", "-aes256", "-passout", "pass:word", "-in", plain, "-out", locked]
    subprocess.run(command, check=True)
    key.write_bytes(Path(locked).read_bytes())
    pid, terminal = pty.fork()
    if pid == 0:
        program = "import sys; from migrator.link.tls import *; load(Path(sys.argv[1]))"
        os.execv(sys.executable, [sys.executable, "-c", program, str(key.parent)])
    os.write(terminal, b"\n")
    said = b""
    try:
        while part := os.read(terminal, 1 << 16):
            said += part
    except OSError:  # EIO: the other end is closed
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    assert b"without a passphrase" in said
    assert b"Enter" not in said


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o620, 0o601])
def test_keys_that_others_may_use_are_refused(tmp_path: Path, mode: int) -> None:
    keys.init(tmp_path / "ca", ["hosta"])
    key = tmp_path / "ca/hosta/host.key"
    credentials = load(key.parent)
    key.chmod(mode)
    with pytest.raises(ConfigError, match=rf"host\.key: others may .* 0{mode:o}.*chmod 600"):
        load(key.parent)
    with pytest.raises(ConfigError):  # nor once they have been loaded
        credentials.server_context()
    key.chmod(0o400)
    load(key.parent)


@pytest.mark.parametrize(
    "peer",
    ["", "sha256:", "sha256:00", "sha256:" + "g" * 64, "sha1:" + "0" * 40, "*.example", "a/b"],
)
def test_peers_that_make_no_sense(place: Place, peer: str) -> None:
    with pytest.raises(ConfigError):
        parse_peer(peer)
    with pytest.raises(ConfigError):
        place.of(A).client_context(peer)
