"""A source that reports more than was written, and the memory itself, which tells what changed.

Sources are coarse for good reasons. A write to a transparent huge page that is write-protected in
async mode (:mod:`tracker.sources.uffd`) is one fault for 2 MiB, all of which count as written: 0.02
us for each page that is written in turn, where small pages take 1.3. The answer to a fault
(:mod:`tracker.answered.uffdsync`) opens 64 KiB. An IOMMU may know no pages but huge ones. Comparing
what they report with what was copied costs half a microsecond a page, less than to send it.

Arming coarsely where pages are small gains nothing: in a chunk of 2 MiB that was opened at one
fault each page still faults at its first write, though nobody is asked then. That costs the writer
1.3 us a page, as much as async mode does. (All measured on Linux 6.18.)
"""

from __future__ import annotations

from collections.abc import Sequence

from tracker.bits.pageset import PageSet
from tracker.errors import RamError, SourceError
from tracker.memory.copies import Copies
from tracker.memory.ram import RamBlock
from tracker.sources.source import DirtySource


class Compared:
    """What another source reports, without the pages that are what their copies are.

    It sees what that source sees. A page that it leaves out is owed by nobody: the destination has
    its bytes.

    :cvar exact: also where the other is not
    :ivar name: that of the other source, and that it is compared
    :ivar copies: to be told of every page that was copied, before the next collection; a page that
        was reported is reported again until then, whenever the other source reports it
    """

    exact = True

    def __init__(
        self, source: DirtySource, pid: int, blocks: Sequence[RamBlock], *, copied: bool = True
    ) -> None:
        """Prepare; nothing is done to the process yet.

        :param source: of the same process and blocks; ours to start and to stop
        :param copied: whether somebody copies the pages; if not, they are compared with what they
            were when they were last reported, or when this source was started
        """
        self.name = f"{source.name}, compared"
        self.copies = Copies(pid, blocks, copied=copied)
        self._source = source
        self._unseen = PageSet.empty(blocks) if copied else PageSet.full(blocks)

    def start(self) -> None:
        """Begin to track; no copy is known yet. Where nobody copies, all is read once.

        :raise SourceError: a file cannot be opened or mapped
        :raise TrackerError: the other source cannot begin
        """
        try:
            self.copies.open()
            self._source.start()
            for name, pages in self._unseen.items():
                self.copies.differing(name, pages)
        except BaseException as error:
            self.stop()
            if isinstance(error, (OSError, RamError)):
                raise SourceError(self.name, str(error)) from error
            raise

    def collect(self) -> PageSet:
        """Pages that the other source reports, and that are not what their copies are.

        They are looked at after that source has armed them again: a write that comes too late for
        the look is in its next report.

        :raise SourceError: the other source, or a file, cannot tell
        """
        reports = self._source.collect()
        try:
            return PageSet(
                reports.blocks, {n: self.copies.differing(n, p) for n, p in reports.items()}
            )
        except (OSError, RamError) as error:
            raise SourceError(self.name, str(error)) from error

    def stop(self) -> None:
        """Stop the other source too. May be called again."""
        self._source.stop()
        self.copies.close()
