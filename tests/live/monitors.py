"""A second QMP client of a QEMU: an operator, or an agent, that a migration knows nothing of."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.live.vms import Machine

_ANSWER_S = 60.0


class Monitor:
    """A blocking QMP client, for callbacks in an event loop that must not go on meanwhile."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_ANSWER_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        self.events: list[dict[str, Any]] = []
        json.loads(self._lines.readline())  # the greeting
        self.execute("qmp_capabilities")

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command; its answer is for :meth:`answer`."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        said = json.dumps({"execute": command, "arguments": named})
        self._socket.sendall(said.encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        """The answer to a command: with ``return``, or with ``error``."""
        while True:
            said: dict[str, Any] = json.loads(self._lines.readline())
            if "event" not in said:
                return said
            self.events.append(said)

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a command that QEMU accepts; return what it returns."""
        self.send(command, **arguments)
        answer = self.answer()
        assert "return" in answer, (command, answer)
        return answer["return"]

    def refuses(self, command: str, **arguments: Any) -> str:
        """Execute a command that QEMU does not accept; return why."""
        self.send(command, **arguments)
        answer = self.answer()
        assert "error" in answer, (command, answer)
        return str(answer["error"]["desc"])

    def state(self) -> str:
        """The run state."""
        return str(self.execute("query-status")["status"])

    def settings(self) -> dict[str, Any]:
        """All migration capabilities and parameters."""
        found = {c["capability"]: c["state"] for c in self.execute("query-migrate-capabilities")}
        return {**found, **self.execute("query-migrate-parameters")}

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Monitors:
    """Where the second monitors of a pair listen."""

    source: Path
    destination: Path


@contextmanager
def with_monitors(machine: Machine) -> Iterator[tuple[Machine, Monitors]]:
    """The same machine, with a second monitor at each side."""
    with tempfile.TemporaryDirectory(prefix="test-live-") as directory:
        paths = Monitors(Path(directory) / "source", Path(directory) / "destination")

        def more(path: Path) -> list[str]:
            return ["-qmp", f"unix:{path},server=on,wait=off"]

        yield (
            replace(
                machine,
                source_extra=[*machine.source_extra, *more(paths.source)],
                destination_extra=[*machine.destination_extra, *more(paths.destination)],
            ),
            paths,
        )
