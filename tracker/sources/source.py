"""What a dirty source has to promise."""

from __future__ import annotations

from typing import Protocol

from tracker.bits.pageset import PageSet


class DirtySource(Protocol):
    """Somebody who knows which pages were written: a page table, an IOMMU, a device, a file.

    Called in this order: :meth:`start`, then :meth:`collect` any number of times, then
    :meth:`stop`. Each source sees some kinds of writes only; what must be sent again is what *any*
    of them reports (see :mod:`tracker.bits.merge`).

    There is nothing here to inherit: a source that does not implement a call is no source. One
    that had a default for :meth:`collect` could forget to report, and a page that is not reported
    is a page that is lost.
    """

    @property
    def name(self) -> str:
        """Short, and unique among the sources of a migration: errors and the report use it."""

    @property
    def exact(self) -> bool:
        """Whether a page is reported only if something may have written it.

        Known when :meth:`start` has returned. An IOMMU without dirty bits is not exact: it reports
        all that is mapped, each time. What only such a source reports is not sent but compared,
        once nothing can write any more.
        """

    def start(self) -> None:
        """Begin to track.

        Every write that happens after this call has returned is in some later :meth:`collect`.
        When it raises, it has already undone what it did.

        :raise SourceError: tracking cannot begin; sources that run code in QEMU raise other
            :class:`~tracker.errors.TrackerError` as well
        """

    def collect(self) -> PageSet:
        """Pages written since the last collect, or since :meth:`start`.

        The caller must read the pages' content after this call, never before it: a write that
        comes too late for this call is in the next one.

        A collected bit is owed. It is gone from the source, so that the caller has to keep it,
        OR-ed into what later calls report, until the page has been delivered.

        :return: pages of *every* block that was given to the source; the caller's to keep and to
            change
        :raise SourceError: the source cannot tell. Never an empty bitmap instead: whoever does not
            know either reports every page, or raises. Bits that were consumed before the failure
            are lost: treat every page as written, or give up.
        """

    def stop(self) -> None:
        """Stop tracking and leave nothing behind in the process that is tracked.

        Possible in every state, before :meth:`start` and twice too.
        """
