"""What a downtime is made of, before it happens. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from migrator.report.phases import DOWNTIME, Phase

if TYPE_CHECKING:
    from migrator.report.report import Report


@dataclass(frozen=True)
class Fixed:
    """What a switchover costs that does not depend on pages.

    The defaults are medians of migrations of a guest of 1 GiB on one idle host of two cores, under
    TCG; :meth:`of` takes those of an earlier migration instead.

    :ivar prepare_ms: from the last round to the stop. The guest still runs, and writes.
    :ivar stop_ms: the vCPUs come to a stand, block I/O is drained
    :ivar device_state_ms: saving it
    :ivar load_ms: loading it at the destination
    :ivar resume_ms: the destination runs
    """

    prepare_ms: float = 40.0
    stop_ms: float = 1.5
    device_state_ms: float = 5.0
    load_ms: float = 5.0
    resume_ms: float = 0.5

    @classmethod
    def of(cls, report: Report) -> Fixed:
        """What an earlier migration between the same hosts measured; the rest is what it is here.

        A rehearsal measures all but saving and loading.
        """
        usual = cls()
        spent = report.phases
        return cls(
            prepare_ms=spent.get(Phase.SWITCHOVER.value, usual.prepare_ms),
            stop_ms=spent.get(Phase.STOP.value, usual.stop_ms),
            device_state_ms=spent.get(Phase.DEVICE_STATE.value, usual.device_state_ms),
            load_ms=spent.get(Phase.LOAD.value, usual.load_ms),
            resume_ms=spent.get(Phase.RESUME.value, usual.resume_ms),
        )


Terms = dict[str, float]
"""Milliseconds by name of a phase, of those that make up the downtime."""


def predict(
    fixed: Fixed,
    *,
    send_bytes: float,
    bytes_per_s: float,
    compare_bytes: float = 0.0,
    compare_bytes_per_s: float = 1.0,
    collect_ms: float = 0.0,
) -> Terms:
    """The downtime to be expected, by phase.

    :param send_bytes: pages that will have to be sent while the guest stands
    :param compare_bytes: likewise compared
    :param collect_ms: reading the sources, which is done twice
    """
    terms = {
        Phase.STOP: fixed.stop_ms,
        Phase.FINAL_COLLECT: collect_ms,
        Phase.COMPARE: compare_bytes / max(compare_bytes_per_s, 1.0) * 1000,
        Phase.FINAL_SEND: send_bytes / max(bytes_per_s, 1.0) * 1000,
        Phase.DEVICE_STATE: fixed.device_state_ms,
        Phase.LAST_COLLECT: collect_ms,
        Phase.LOAD: fixed.load_ms,
        Phase.RESUME: fixed.resume_ms,
    }
    return {phase.value: terms[phase] for phase in DOWNTIME}
