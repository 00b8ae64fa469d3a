"""QEMU's migration capabilities and parameters: those that a migration changes, and their way back.

``x-ignore-shared`` left on is a trap: the next ``savevm`` succeeds and holds no RAM. So the present
values are read before anything is changed, and put back after every end, on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from migrator.errors import CommandFailed
from migrator.qemu.qmp import Qmp

# multifd: QEMU's own migration may have left it on, and refuses a single stream then
DESTINATION_CAPABILITIES = {"x-ignore-shared": True, "events": True, "multifd": False}
SOURCE_CAPABILITIES = {**DESTINATION_CAPABILITIES, "pause-before-switchover": True}
SOURCE_PARAMETERS = {"max-bandwidth": 1 << 40}  # its own stream never has to wait

_DEFAULT_BANDWIDTH = 128 << 20  # bytes a second; QEMU: migration/options.c, MAX_THROTTLE


@dataclass(frozen=True)
class Settings:
    """Migration capabilities and parameters of one QEMU, by name."""

    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)


DEFAULTS = Settings(
    {name: False for name in SOURCE_CAPABILITIES if name != "events"},
    {"max-bandwidth": _DEFAULT_BANDWIDTH},
)
"""QEMU's defaults of all that a migration changes, but for events, which do no harm."""


async def read_settings(qmp: Qmp) -> Settings:
    """The present values of all that a migration may change.

    :raise VmError: QEMU does not answer
    """
    capabilities = await qmp.capabilities()
    parameters = await qmp.execute("query-migrate-parameters")
    return Settings(
        {name: capabilities[name] for name in SOURCE_CAPABILITIES if name in capabilities},
        {name: parameters[name] for name in SOURCE_PARAMETERS if name in parameters},
    )


async def put_back(qmp: Qmp, before: Settings) -> None:
    """Set again the values that were read before.

    :raise CommandFailed: QEMU refuses one; all others are set
    :raise QmpUnreachable: QEMU does not answer
    """
    refused: CommandFailed | None = None
    if before.capabilities:
        try:
            await qmp.set_capabilities(before.capabilities)
        except CommandFailed as error:
            refused = error
    if before.parameters:
        await qmp.execute("migrate-set-parameters", **before.parameters)
    if refused is not None:
        raise refused


def to_undo(found: Settings) -> Settings | None:
    """The settings that undo those of a migration of this program that was killed, if it was.

    A source has more of them than a destination, whose receiver was killed.
    """
    if not found.capabilities.get("x-ignore-shared"):
        return None
    is_source = (
        bool(found.capabilities.get("pause-before-switchover"))
        and found.parameters.get("max-bandwidth") == SOURCE_PARAMETERS["max-bandwidth"]
    )
    return DEFAULTS if is_source else Settings({"x-ignore-shared": False})
