"""The faults: their names, and the groups that the oracles distinguish."""

from __future__ import annotations

from enum import Enum


class Fault(Enum):
    """One fault; the values are the names in tables."""

    NONE = "none"
    COMMAND_KILL = "command SIGKILL"
    COMMAND_AND_GUARD_KILL = "command+guard SIGKILL"
    GUARD_KILL = "guard SIGKILL"
    COMMAND_TERM = "command SIGTERM"
    COMMAND_INT = "command SIGINT"
    COMMAND_HUP = "command SIGHUP"
    COMMAND_FREEZE = "command SIGSTOP"
    OUTPUT_CLOSED = "output closed"
    OUTPUT_FULL = "stdout full"
    SOURCE_KILL = "source SIGKILL"
    SOURCE_FREEZE = "source SIGSTOP"
    SOURCE_CONT = "source cont"
    SOURCE_CONT_BURST = "source cont burst"
    SOURCE_STOP = "source stop"
    SOURCE_STOP_CONT = "source stop cont"
    SOURCE_RESET = "source reset"
    SOURCE_CANCEL = "source cancel"
    SOURCE_QUIT = "source quit"
    GUEST_ENDS = "guest ends"
    DESTINATION_KILL = "destination SIGKILL"
    DESTINATION_FREEZE = "destination SIGSTOP"
    DESTINATION_CONT = "destination cont"
    DESTINATION_CONT_BURST = "destination cont burst"
    DESTINATION_STOP = "destination stop"
    DESTINATION_STOP_CONT = "destination stop cont"
    DESTINATION_RESET = "destination reset"
    DESTINATION_CANCEL = "destination cancel"
    DESTINATION_QUIT = "destination quit"
    DESTINATION_FULL = "destination full"
    LINK_BLINK = "link cut briefly"
    LINK_CUT = "link cut"
    LINK_DROP_FROM_A = "link drops a to b"
    LINK_DROP_FROM_B = "link drops b to a"
    RECEIVER_KILL = "receiver SIGKILL"
    RECEIVER_TERM = "receiver SIGTERM"
    RECEIVER_HUP = "receiver SIGHUP"


NETWORK = frozenset(
    {Fault.LINK_BLINK, Fault.LINK_CUT, Fault.LINK_DROP_FROM_A, Fault.LINK_DROP_FROM_B}
)
RECEIVER = frozenset({Fault.RECEIVER_KILL, Fault.RECEIVER_TERM, Fault.RECEIVER_HUP})
TWO_HOSTS_ONLY = NETWORK | RECEIVER
"""Faults of parts that only a migration between hosts has."""

ENDS_SOURCE = frozenset({Fault.SOURCE_KILL, Fault.SOURCE_QUIT, Fault.GUEST_ENDS})
ENDS_DESTINATION = frozenset({Fault.DESTINATION_KILL, Fault.DESTINATION_QUIT})
RESETS = frozenset({Fault.SOURCE_RESET, Fault.DESTINATION_RESET})
"""The guest boots anew, on one side, if the fault finds it there."""

CONTINUES_SOURCE = frozenset(
    {Fault.SOURCE_CONT, Fault.SOURCE_CONT_BURST, Fault.SOURCE_STOP_CONT, Fault.SOURCE_CANCEL}
)
"""The operator lets the source run; QEMU does so too when its own migration is cancelled."""

KILLS_COMMAND = frozenset({Fault.COMMAND_KILL, Fault.COMMAND_AND_GUARD_KILL, Fault.COMMAND_HUP})
"""The command may end without an exit code of its own."""

DECIDABLE = frozenset(
    {
        Fault.NONE,
        Fault.GUARD_KILL,
        Fault.COMMAND_TERM,
        Fault.COMMAND_INT,
        Fault.COMMAND_FREEZE,
        Fault.OUTPUT_CLOSED,
        Fault.OUTPUT_FULL,
        Fault.SOURCE_FREEZE,
        Fault.SOURCE_CONT,
        Fault.SOURCE_CONT_BURST,
        Fault.SOURCE_STOP,
        Fault.SOURCE_STOP_CONT,
        Fault.SOURCE_CANCEL,
        Fault.DESTINATION_FREEZE,
        Fault.DESTINATION_CONT,
        Fault.DESTINATION_CONT_BURST,
        Fault.DESTINATION_CANCEL,
        Fault.DESTINATION_FULL,
        Fault.LINK_BLINK,
    }
)
"""Both QEMUs live and can be asked: an exit code 4 beside one side that runs is not the truth."""

PLAIN = frozenset(
    {
        Fault.NONE,
        Fault.COMMAND_KILL,
        Fault.GUARD_KILL,
        Fault.COMMAND_TERM,
        Fault.COMMAND_INT,
        Fault.COMMAND_FREEZE,
        Fault.SOURCE_FREEZE,
        Fault.DESTINATION_KILL,
        Fault.DESTINATION_FREEZE,
        Fault.LINK_BLINK,
    }
)
"""Faults that a guest which the operator had paused is disturbed by."""
