"""A running migration asked from elsewhere: real sockets, and every way not to be served."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from migrator.control import client as control_client
from migrator.control.server import LINE_BYTES, ControlSocket, own_directory
from migrator.errors import Aborted, ControlError, Refused, Undecided
from migrator.report.phases import DOWNTIME, Phase
from migrator.report.report import Progress
from tests.conftest import require

PROGRESS = Progress("rounds", 3, 1000, 250, 99_999, 2.0 * (1 << 30), 33.5, 1.25, "so")
NOBODY = 65534


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "qemu-migrator"


def stale(path: Path) -> None:
    """A socket whose process is gone."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


class Connection:
    """A client without the client's code."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, control: ControlSocket) -> Connection:
        return cls(*await asyncio.open_unix_connection(control.path))

    def send(self, line: bytes) -> None:
        self.writer.write(line)

    def ask(self, command: str) -> None:
        self.send(json.dumps({"command": command}).encode() + b"\n")

    async def answer(self) -> dict[str, Any]:
        line = await asyncio.wait_for(self.reader.readline(), 20)
        assert line.endswith(b"\n"), "the connection was closed"
        found: dict[str, Any] = json.loads(line)
        return found

    async def is_closed(self) -> bool:
        try:
            return await asyncio.wait_for(self.reader.read(), 20) == b""
        except ConnectionResetError:
            return True


def served(
    body: Callable[[ControlSocket], Coroutine[Any, Any, None]],
    cancel: Callable[[], object] = lambda: None,
    path: Path | None = None,
) -> None:
    async def serve() -> None:
        async with ControlSocket("a → b", cancel, path) as control:
            await body(control)

    asyncio.run(serve())


# -- what is asked, and answered ----------------------------------------------------------------


def test_status() -> None:
    async def body(control: ControlSocket) -> None:
        client = await Connection.to(control)
        client.ask("status")
        said = await client.answer()
        assert (said["what"], said["pid"], said["phase"]) == ("a → b", os.getpid(), "start")
        for number in (3, 4):
            control.show(replace(PROGRESS, round=number))
            client.ask("status")
            said = await client.answer()
            assert control_client.progress(said) == replace(PROGRESS, round=number)
        client.writer.close()

    served(body)


def test_several_requests_in_one_piece_and_one_in_several() -> None:
    async def body(control: ControlSocket) -> None:
        client = await Connection.to(control)
        request = b'{"command": "status"}\n'
        client.send(request * 3 + request[:7])
        for _ in range(3):
            assert (await client.answer())["what"] == "a → b"
        client.send(request[7:])
        assert (await client.answer())["what"] == "a → b"
        client.writer.close()

    served(body)


def test_watch_tells_every_phase_but_those_of_the_downtime() -> None:
    async def body(control: ControlSocket) -> None:
        watching, silent = await Connection.to(control), await Connection.to(control)
        watching.ask("watch")
        assert (await watching.answer())["phase"] == "start"
        for phase in Phase:
            control.show(replace(PROGRESS, phase=phase.value))
            control.show(replace(PROGRESS, phase=phase.value, round=9))  # too soon
            watching.ask("status")  # answered from what was kept
            if phase not in DOWNTIME:
                said = await watching.answer()
                assert (said["phase"], said["round"]) == (phase.value, 3)
            said = await watching.answer()
            assert (said["phase"], said["round"]) == (phase.value, 9)
        silent.ask("status")
        assert (await silent.answer())["phase"] == Phase.ROLLBACK.value
        for client in (watching, silent):
            client.writer.close()

    served(body)


def test_watch_tells_what_changes_within_a_phase() -> None:
    async def body(control: ControlSocket) -> None:
        client = await Connection.to(control)
        client.ask("watch")
        await client.answer()
        for number in (1, 2):
            control.show(replace(PROGRESS, round=number))
            assert (await client.answer())["round"] == number
            await asyncio.sleep(0.11)
        client.writer.close()

    served(body)


ENDS: list[tuple[BaseException | None, str, str, int]] = [
    (None, "completed", "", 0),
    (Aborted("rounds", "does not converge"), "aborted", "does not converge", 1),
    (Undecided("resume", "no answer", ["it is alive"]), "failed", "no answer; it is alive", 4),
    (Refused([]), "aborted", "Refused", 3),
    (asyncio.CancelledError(), "aborted", "interrupted", 1),
    (ZeroDivisionError(), "failed", "ZeroDivisionError", 4),
]


@pytest.mark.parametrize(("error", "status", "reason", "code"), ENDS, ids=lambda x: repr(x)[:9])
@pytest.mark.parametrize("command", ["watch", "cancel"])
def test_at_last_how_it_ended(
    error: BaseException | None, status: str, reason: str, code: int, command: str
) -> None:
    async def body() -> None:
        control = ControlSocket("a", lambda: None)
        with pytest.raises(type(error)) if error is not None else nullcontext():
            async with control:
                client = await Connection.to(control)
                client.ask(command)
                await client.answer()
                if error is not None:
                    raise error
        assert await client.answer() == {
            "ended": {"status": status, "reason": reason, "exit_code": code}
        }
        assert await client.is_closed()
        client.writer.close()
        assert not control.path.exists()

    asyncio.run(body())


def test_cancel_cancels_and_nothing_else_does() -> None:
    asked: list[str] = []

    async def body(control: ControlSocket) -> None:
        client = await Connection.to(control)
        for command in ("status", "watch"):
            client.ask(command)
            await client.answer()
        assert asked == []
        client.ask("cancel")
        assert await client.answer() == {"cancelling": True}
        assert asked == ["once"]
        client.writer.close()

    served(body, lambda: asked.append("once"))


# -- clients that are not served ----------------------------------------------------------------


@pytest.mark.parametrize(
    "line", [b"\n", b"{\n", b"[]\n", b"\xff\n", b'{"command": "explode"}\n', b"[" * 1000 + b"\n"]
)
def test_requests_that_are_not_understood(line: bytes) -> None:
    asked: list[str] = []

    async def body(control: ControlSocket) -> None:
        client = await Connection.to(control)
        client.send(line + b'{"command": "cancel"}\n')
        assert "expected" in (await client.answer())["error"]
        assert await client.is_closed()
        client.writer.close()

    served(body, lambda: asked.append("cancel"))
    assert asked == []


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_that_is_too_long(end: bytes) -> None:
    async def body(control: ControlSocket) -> None:
        request = b'{"command": "status"}'
        client = await Connection.to(control)
        client.send(request.ljust(LINE_BYTES) + b"\n")
        assert (await client.answer())["what"] == "a → b"
        client.send(request.ljust(LINE_BYTES + 1) + end)
        assert str(LINE_BYTES) in (await client.answer())["error"]
        assert await client.is_closed()
        client.writer.close()

    served(body)


@pytest.mark.parametrize("command", ["watch", "status"])
def test_a_client_that_never_reads_is_dropped(command: str) -> None:
    async def body(control: ControlSocket) -> None:
        reads, never = await Connection.to(control), socket.socket(socket.AF_UNIX)
        never.connect(str(control.path))
        never.setblocking(False)
        reads.ask("watch")
        await reads.answer()
        request = json.dumps({"command": command}).encode() + b"\n"
        never.sendall(request)
        seen = 0
        while len(control.clients) < 2:
            await asyncio.sleep(0)
        while len(control.clients) == 2:
            if command == "status":
                never.send(request)
            control.show(replace(PROGRESS, phase=("copy", "rounds")[seen % 2], round=seen))
            assert (await reads.answer())["round"] == seen
            seen += 1
            assert seen < 100_000
        assert seen > 10
        never.close()
        reads.writer.close()

    served(body)


def test_a_client_that_never_reads_does_not_hold_up_the_end() -> None:
    async def body(control: ControlSocket) -> None:
        with socket.socket(socket.AF_UNIX) as never:
            never.connect(str(control.path))
            never.sendall(b'{"command": "watch"}\n')
            while not control.clients:
                await asyncio.sleep(0)
            (client,) = control.clients
            while not client._transport.get_write_buffer_size():
                client.say({"fill": "x" * 1000})
            await control.__aexit__(None, None, None)
            assert control.clients == {client}  # until the loop turns again
            await asyncio.sleep(0)
            assert not control.clients

    served(body)


def test_so_many_clients_and_no_more() -> None:
    async def body(control: ControlSocket) -> None:
        clients = [await Connection.to(control) for _ in range(33)]
        assert await clients[-1].is_closed()
        clients[0].ask("status")
        await clients[0].answer()
        clients[1].writer.close()
        while len(control.clients) == 32:
            await asyncio.sleep(0)
        clients[1] = await Connection.to(control)
        clients[1].ask("status")
        await clients[1].answer()
        for client in clients:
            client.writer.close()

    served(body)


_ASK_AS = """
import os, socket, sys
os.setuid(int(sys.argv[2]))
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
try:
    connection.sendall(b'{"command": "cancel"}\\n')
    print(connection.recv(100))
except OSError:
    print(b"")
"""


@pytest.mark.parametrize(("user", "answer"), [(0, b'{"cancelling": true}\n'), (NOBODY, b"")])
def test_strangers_are_not_served(user: int, answer: bytes) -> None:
    require(None if os.geteuid() == 0 else "only root may become somebody else")
    asked: list[str] = []

    async def body(control: ControlSocket) -> None:
        control.path.chmod(0o777)
        asking = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", _ASK_AS, str(control.path), str(user)],
            stdout=subprocess.PIPE,
        )
        said, _ = await asyncio.wait_for(asking.communicate(), 60)
        assert said == repr(answer).encode() + b"\n"
        assert asked == ["cancel"] * bool(answer)

    path = Path(f"/tmp/test-control-{os.getpid()}.sock")  # where a stranger may look
    served(body, lambda: asked.append("cancel"), path)
    assert not path.exists()


# -- places -------------------------------------------------------------------------------------


def test_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert own_directory() == tmp_path / "qemu-migrator"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    assert own_directory() == Path("/run/qemu-migrator") or os.geteuid()
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert own_directory() == Path("/tmp/qemu-migrator-1234")


def test_the_socket_is_there_and_only_for_as_long_as_it_is_served(runtime: Path) -> None:
    async def body(control: ControlSocket) -> None:
        assert control.path == runtime / f"{os.getpid()}.sock"
        assert list(runtime.iterdir()) == [control.path]
        assert runtime.stat().st_mode & 0o777 == 0o700
        assert control_client.served() == [control.path]

    assert control_client.served() == []
    served(body)
    assert list(runtime.iterdir()) == []


def test_a_path_longer_than_a_socket_may_have(tmp_path: Path) -> None:
    path = tmp_path / ("long" * 30) / "control"
    path.parent.mkdir()

    async def body(control: ControlSocket) -> None:
        said = await asyncio.to_thread(control_client.status, path)
        assert said["what"] == "a → b"

    served(body, path=path)


def test_a_stale_socket_is_replaced_and_one_in_use_is_not(runtime: Path) -> None:
    runtime.mkdir(mode=0o700)
    stale(runtime / f"{os.getpid()}.sock")

    async def body(control: ControlSocket) -> None:
        with pytest.raises(ControlError, match="is there already"):
            await ControlSocket("another", lambda: None).__aenter__()
        client = await Connection.to(control)
        client.ask("status")
        assert (await client.answer())["what"] == "a → b"
        client.writer.close()

    served(body)


def test_stale_sockets_are_removed_by_who_looks_and_nothing_else_is(runtime: Path) -> None:
    async def body(control: ControlSocket) -> None:
        stale(runtime / "1.sock")
        stale(runtime / "other")
        (runtime / "2.sock").write_text("no socket")
        listening = socket.socket(socket.AF_UNIX)  # and never accepts
        listening.bind(str(runtime / "3.sock"))
        listening.listen(0)
        kept = [runtime / "2.sock", runtime / "3.sock", control.path]
        full = socket.socket(socket.AF_UNIX)
        full.connect(str(runtime / "3.sock"))
        assert sorted(await asyncio.to_thread(control_client.served)) == sorted(kept)
        assert sorted(runtime.iterdir()) == sorted([*kept, runtime / "other"])
        full.close()
        listening.close()

    served(body)


def make_link(directory: Path) -> None:
    elsewhere = directory.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    directory.symlink_to(elsewhere)


def make_open(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o750)


def make_anothers(directory: Path) -> None:
    require(None if os.geteuid() == 0 else "only root may give a directory away")
    directory.mkdir(mode=0o700)
    os.chown(directory, NOBODY, -1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_link, "Not a directory"),
        (make_open, "mode 750"),
        (make_anothers, f"user {NOBODY}"),
        (lambda directory: directory.write_text("file"), "Not a directory"),
    ],
)
def test_directories_that_are_refused(
    runtime: Path, make: Callable[[Path], None], said: str
) -> None:
    async def body(_: ControlSocket) -> None:
        raise AssertionError("it was served")

    make(runtime)
    with pytest.raises(ControlError, match=said):
        served(body)
    with pytest.raises(ControlError, match=said):
        control_client.served()
    if runtime.is_dir():
        assert list(runtime.iterdir()) == []
