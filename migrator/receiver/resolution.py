"""What each side holds after a migration between hosts broke off; an operator's decision."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from migrator.errors import (
    LinkError,
    MigratorError,
    QmpUnreachable,
    SourceRuns,
    SourceUnreachable,
    VmError,
)
from migrator.link.messages import State
from migrator.link.session import Link, settle_outcome
from migrator.qemu.qmp import Qmp
from migrator.qemu.rollback import UNDER_WAY, Before, bring_back
from migrator.qemu.settings import DEFAULTS, put_back, read_settings, to_undo

_PATIENCE_S = 5.0
# it may be in the middle of a migration that nobody ends any more, and had these before it
_LEFT_BEHIND = Before(was_running=True, settings=DEFAULTS, paused_by_us=True)
_COMPLETE = ("postmigrate", "finish-migrate", "paused")
_MEANINGS = {
    State.WAITING: "the destination waits for a VM: none came, or it was started anew",
    State.OPEN: "the destination has some of the VM, and cannot run",
    State.READY: "the destination has all of the VM, was not told to go, and does not run",
    State.GOING: "the destination was told to go, and is at it",
    State.RUNNING: "the destination runs",
    State.NEVER: "the destination did not run, and never will",
    State.UNKNOWN: "the destination was told to go; its receiver cannot say whether QEMU runs",
}


# only of a destination that has said that it does not run
_MAY_BE_DECIDED = {
    "open": "--decide source",
    "ready": "--decide source or --decide destination",
    "never": "--decide source",
}


@dataclass
class Resolution:
    """What was found, and what was done.

    :ivar source: run state of the source, or ``None`` where it was not asked or does not answer
    :ivar destination: state of the receiver (:mod:`migrator.receiver.incoming`), likewise
    :ivar sentences: all of it for people
    :ivar decided: whether exactly one side runs now, as far as was asked
    """

    source: str | None = None
    destination: str | None = None
    sentences: list[str] = field(default_factory=list)
    decided: bool = False

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return 0 if self.decided else 4

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


async def resolve(
    source: str | None, link: Link | None, decide: str | None, *, gone: bool = False
) -> Resolution:
    """Ask both sides; let one run, if that is what was decided.

    The destination is asked, and told, first: a source is let run only when the destination has
    said that it never will, or was said to be gone. A destination is let run only when the source,
    if that was named, says that it does not: a second one would have memory that is old by now.

    :param source: QMP socket of the source
    :param link: where the destination is received; ``None``: it is not asked
    :param gone: the operator has seen to it that the destination does not run
    :param decide: ``source``, ``destination``, or ``None`` to change nothing
    :raise SourceRuns: the destination was decided for, and the source runs; nothing was changed
    :raise SourceUnreachable: likewise, and it does not answer
    :raise VmError: the source refuses to run
    :raise LinkError: the destination refuses what was decided, or cannot be told
    """
    found = Resolution()
    if source is not None and decide == "destination" and await _runs(source):
        raise SourceRuns("source", "runs: end it first, or decide for it")
    if link is not None:
        try:
            answer = await settle_outcome(link, "", decide, patience_s=_PATIENCE_S)
        except LinkError as error:
            if decide is not None and not gone:
                raise
            found.sentences.append(
                f"the destination cannot be asked: {error}; it may run: see to it that it does "
                "not before the source is let run"
            )
        else:
            found.destination = answer.state.value
            found.sentences.append(_MEANINGS[answer.state])
            if answer.reason:
                found.sentences[-1] += f" ({answer.reason})"
    may_run = gone or found.destination == "never"
    if source is not None:
        await _the_source(source, found, run=decide == "source" and may_run, told=link is not None)
    if decide == "source" and not may_run:
        why = "the destination is the one to run"
        if found.destination == "waiting":
            why = (
                "this receiver knows of no VM, and one before it may have let it run: see to it "
                "that it does not, and say so with --destination-is-gone"
            )
        found.sentences.append(f"the source was left as it is: {why}")
    known = link is None or found.destination not in (None, "unknown") or gone
    found.decided = known and (found.source == "running") != (found.destination == "running")
    if not found.decided and decide is None and found.destination in _MAY_BE_DECIDED:
        found.sentences.append(f"{_MAY_BE_DECIDED[found.destination]} lets one of them run")
    return found


async def _runs(path: str) -> bool:
    try:
        qmp = await Qmp.connect("source", path)
    except QmpUnreachable as error:
        raise SourceUnreachable(error.vm, error.reason) from error
    try:
        return await qmp.run_state() == "running"
    finally:
        await qmp.close()


async def _the_source(path: str, found: Resolution, *, run: bool, told: bool) -> None:
    try:
        qmp = await Qmp.connect("source", path)
    except MigratorError as error:
        if run:
            raise
        found.sentences.append(f"the source cannot be asked: {error}")
        return
    try:
        found.source = await qmp.run_state()
        status = (await qmp.migration()).get("status")
        # nothing is saved before that, so that no destination can run; one that can be told is told
        before_saving = status == "pre-switchover" and not told
        if (run or before_saving) and found.source != "running":
            found.source = await bring_back(qmp, _LEFT_BEHIND)
            if found.source != "running":
                raise VmError("source", f"does not go on: it is {found.source!r}")
            if before_saving:
                found.sentences.append(
                    "the source had been left before it saved its state, so that no destination "
                    "can run: it was let run"
                )
        elif status not in UNDER_WAY and (undo := to_undo(await read_settings(qmp))):
            await put_back(qmp, undo)
            found.sentences.append(
                "the source had settings of a migration that was killed: they were put back, as "
                "its snapshots would have held no RAM"
            )
    finally:
        await qmp.close()
    complete = " and complete" if found.source in _COMPLETE else ""
    found.sentences.append(f"the source is {found.source!r}{complete}")
