"""Whoever is not who was wanted, at either end: no word of the protocol, and nothing of the VM.

Both ends are the real commands, with OpenSSL's at the other end, or each other.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from migrator.guest.workload import boot_image
from migrator.link import envelope, keys
from migrator.link.tls import Credentials
from migrator.qemu.process import RunDirectory, Vm
from tests.live.sending import MIGRATOR, SMALL, Receiver, eventually
from tests.live.test_hostile import start
from tests.live.vms import Pair
from tests.migrator.link.test_tls import (
    LOOPBACK,
    WRONG,
    Place,
    expired,
    of_another_ca,
    s_client,
    s_server,
    shown,
)

pytestmark = pytest.mark.live

SOURCE, OTHER = "hosta.example", "hostc.example"
DEADLINE_S = 60.0
OPENING = envelope.opening()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Keys of the receiver's host, which is this one, of the source's, and of a third."""
    home = tmp_path_factory.mktemp("impostors") / "ca"
    keys.init(home, [LOOPBACK, SOURCE, OTHER])
    return Place(home)


def receiving(place: Place, peer: str) -> Iterator[Receiver]:
    with TemporaryDirectory(prefix="impostors-") as directory:
        own = str(place.home / LOOPBACK)
        receiver = start(Path(directory), "--tls", own, "--from", peer)
        try:
            asyncio.run(receiver.waiting())
            yield receiver
        finally:
            asyncio.run(receiver.end())


@pytest.fixture(scope="module")
def receiver(place: Place) -> Iterator[Receiver]:
    """Lets the source's host in, by its name."""
    yield from receiving(place, SOURCE)


@pytest.fixture(scope="module")
def pinned(place: Place) -> Iterator[Receiver]:
    """Lets one in, by a fingerprint that is not of the source's certificate."""
    yield from receiving(place, place.fingerprint(OTHER))


@pytest.fixture(scope="module")
def vm() -> Iterator[Vm]:
    """A running VM."""
    with RunDirectory() as directory:
        image = directory / "guest.img"
        image.write_bytes(boot_image(SMALL.workload))
        made = Vm("source", directory)

        async def run() -> None:
            await made.start(SMALL.arguments(image, made.console), incoming=False)
            await Pair.beats(made, 3)

        try:
            asyncio.run(run())
            yield made
        finally:
            asyncio.run(made.stop())


def logs(receiver: Receiver, began: int, why: str) -> None:
    """Check that it says why, after so many lines."""

    def said() -> object:
        return re.search(why, "\n".join(receiver.lines[began:]))

    asyncio.run(eventually(said, f"{why}: {receiver.lines[began:]}"))
    assert "Traceback" not in receiver.said
    assert receiver.process.poll() is None


# -- who connects ---------------------------------------------------------------------------------


def test_the_right_one_is_spoken_to(place: Place, receiver: Receiver) -> None:
    assert s_client(receiver.port, *shown(place.of(SOURCE))) == OPENING


@pytest.mark.parametrize(("wrong", "why"), WRONG, ids=lambda x: getattr(x, "__name__", ""))
def test_a_wrong_certificate(
    place: Place,
    receiver: Receiver,
    tmp_path: Path,
    wrong: Callable[[Place, Path], Credentials],
    why: str,
) -> None:
    began = len(receiver.lines)
    assert s_client(receiver.port, *shown(wrong(place, tmp_path / "forged"))) == b""
    logs(receiver, began, why)


def test_no_certificate(receiver: Receiver) -> None:
    began = len(receiver.lines)
    assert s_client(receiver.port) == b""
    logs(receiver, began, "peer did not return a certificate|PEER_DID_NOT_RETURN_A_CERTIFICATE")


def test_another_host(place: Place, receiver: Receiver) -> None:
    began = len(receiver.lines)
    assert s_client(receiver.port, *shown(place.of(OTHER))) == b""
    logs(receiver, began, rf"{OTHER} \(sha256:.*expected {SOURCE} at the other end")


def test_the_right_host_by_the_wrong_fingerprint(place: Place, pinned: Receiver) -> None:
    began = len(pinned.lines)
    assert s_client(pinned.port, *shown(place.of(SOURCE))) == b""
    logs(pinned, began, f"expected {place.fingerprint(OTHER)} at the other end")
    assert s_client(pinned.port, *shown(place.of(OTHER))) == OPENING


def test_an_older_tls(place: Place, receiver: Receiver) -> None:
    began = len(receiver.lines)
    assert s_client(receiver.port, "-tls1_2", *shown(place.of(SOURCE))) == b""
    logs(receiver, began, "TLS: UNSUPPORTED_PROTOCOL")


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\n\r\n", OPENING, b"\0" * 5000])
def test_plain_text(receiver: Receiver, text: bytes) -> None:
    """What comes back is an alert of TLS, if anything."""
    began = len(receiver.lines)
    came = b""
    with socket.create_connection((LOOPBACK, receiver.port), DEADLINE_S) as plain:
        plain.sendall(text)
        try:
            while piece := plain.recv(1 << 16):
                came += piece
        except ConnectionResetError:
            pass
    assert came == b"" or (came[0] == 21 and len(came) == 7)
    logs(receiver, began, "TLS: ")


def test_no_more_than_a_handshake_is_waited_for(receiver: Receiver) -> None:
    """Whoever begins one, and stops, is not spoken to."""
    with socket.create_connection((LOOPBACK, receiver.port), DEADLINE_S) as plain:
        plain.sendall(b"\x16\x03\x01\x02\x00\x01")
        plain.settimeout(1)
        with pytest.raises(TimeoutError):
            plain.recv(1)


# -- who is connected to --------------------------------------------------------------------------


def send(vm: Vm, port: int, tls: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [MIGRATOR, "send", "--source", vm.qmp, "--to", f"{LOOPBACK}:{port}", "--tls"]
    return subprocess.run(
        [*command, str(tls), "--reconnect-seconds", "1", "--json", *options],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why it failed, as it says in JSON."""
    said = json.loads(done.stdout)
    assert said["status"] == "failed"
    assert "Traceback" not in done.stderr
    return str(said["reason"])


def check_untouched(vm: Vm) -> None:
    assert asyncio.run(Pair.state(vm)) == "running"
    assert Pair.traces(vm) == []


def impostor(
    vm: Vm, place: Place, credentials: Credentials, *options: str
) -> tuple[subprocess.CompletedProcess[str], bytes]:
    """Send to OpenSSL's server.

    :return: how that ended, and all that the server printed, which is what it received too
    """
    with s_server(credentials) as (port, output):
        done = send(vm, port, place.home / SOURCE, *options)
    check_untouched(vm)
    assert done.returncode == 1
    return done, b"".join(output)


def test_the_right_server_would_be_spoken_to(vm: Vm, place: Place) -> None:
    """It is no receiver, and no more than who speaks here is said to it."""
    done, received = impostor(vm, place, place.of(LOOPBACK))
    assert "is no migrator" in reason(done)
    assert OPENING in received


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (of_another_ca, "unable to get local issuer certificate"),
        (expired, "certificate has expired"),
    ],
)
@pytest.mark.one_in(2)
def test_a_server_with_a_wrong_certificate(
    vm: Vm, place: Place, tmp_path: Path, wrong: Callable[[Place, Path], Credentials], why: str
) -> None:
    done, received = impostor(vm, place, wrong(place, tmp_path / "forged"), "--peer", SOURCE)
    assert why in reason(done)
    assert OPENING not in received


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "IP address mismatch"),
        (("--peer", SOURCE), "Hostname mismatch"),
    ],
)
@pytest.mark.one_in(2)
def test_a_server_with_the_certificate_of_another_host(
    vm: Vm, place: Place, options: Sequence[str], why: str
) -> None:
    done, received = impostor(vm, place, place.of(OTHER), *options)
    assert why in reason(done)
    assert OPENING not in received


def test_the_right_server_by_the_wrong_fingerprint(vm: Vm, place: Place) -> None:
    pin = place.fingerprint(OTHER)
    done, received = impostor(vm, place, place.of(LOOPBACK), "--peer", pin)
    assert f"expected {pin} at the other end" in reason(done)
    assert OPENING not in received
    done, received = impostor(vm, place, place.of(OTHER), "--peer", pin)
    assert OPENING in received


# -- both ends are ours ---------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_source_that_is_not_let_in(
    vm: Vm, place: Place, receiver: Receiver, tmp_path: Path
) -> None:
    """Either side says why it came to nothing; the receiver waits on."""
    began = len(receiver.lines)
    done = send(vm, receiver.port, place.home / OTHER)
    assert done.returncode == 1
    assert "before it said anything: its log has more" in reason(done)
    logs(receiver, began, f"expected {SOURCE} at the other end")

    began = len(receiver.lines)
    forged = of_another_ca(place, tmp_path / "forged")
    shutil.copy(place.ca, tmp_path / "forged" / "ca.crt")
    done = send(vm, receiver.port, forged.certificate.parent)
    assert done.returncode == 1
    # the alert may be lost with a connection that is reset
    assert re.search("UNKNOWN_CA|before it said anything: its log has more", reason(done))
    logs(receiver, began, "unable to get local issuer certificate")
    check_untouched(vm)


def test_the_right_source_is_let_in(vm: Vm, place: Place, receiver: Receiver) -> None:
    """After all of this; it comes last, since the VM moves."""
    done = send(vm, receiver.port, place.home / SOURCE, "--verify", "--on-limit", "force")
    assert done.returncode == 0, done.stderr
    assert asyncio.run(receiver.ended()) == 0
    assert asyncio.run(Pair.state(receiver.vm)) == "running"
    assert asyncio.run(Pair.state(vm)) == "postmigrate"
