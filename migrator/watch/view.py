"""What people see of a VM that is watched: in one place on a terminal, elsewhere line by line."""

from __future__ import annotations

import math

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from migrator.harmless import harmless
from migrator.watch.sample import Sight

HEIGHTS = "·▁▂▃▄▅▆▇█"
"""From never written to written all the time: more than 0, 1/128, 1/64 … 1/2 of it."""

# viridis, without its darkest end: in order also for those who see no colours
_COLOURS = [
    *("bright_black", "#3e4989", "#31688e", "#26828e", "#1f9e89"),
    *("#35b779", "#6ece58", "#b5de2b", "#fde725"),
]
_WIDTH = 110  # where there is no terminal


class View:
    """The display of one watch."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, emoji=False)
        if not self.console.is_terminal:
            self.console.width = _WIDTH
        self._live: Live | None = None
        self._noted = False

    def __enter__(self) -> View:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, sight: Sight) -> None:
        """Show what was seen last."""
        if not self._noted:
            self._noted = True
            for note in sight.notes:
                self.console.print(harmless(f"note: {note}"), markup=False, soft_wrap=True)
            self.console.print(legend(), soft_wrap=True)
        found = Group(*lines(sight, self.console.width))
        if self._live is not None:
            self._live.update(found, refresh=True)
        else:
            self.console.print(found)


def legend() -> Text:
    """What the strips mean."""
    heights = Text.assemble(*((HEIGHTS[i], _COLOURS[i]) for i in range(1, len(HEIGHTS))))
    return Text.assemble(
        "each line is the RAM of a memory backend, first page to last; ",
        *(heights, ": how much of it is written all the time, up to 1 % to over half, each step "),
        "twice as much; ",
        (HEIGHTS[0], _COLOURS[0]),
        ": none",
    )


def lines(sight: Sight, width: int) -> list[Text]:
    """Everything about an interval, for a terminal of so many columns."""
    by_source = ", ".join(f"{name} {rate:,.0f}" for name, rate in sight.dirty_pages_per_s.items())
    working_sets = ", ".join(
        f"{seconds} s {_mib(found) if found is not None else '–'}"
        for seconds, found in sight.working_set_bytes.items()
    )
    said = [
        Text.assemble((f"{sight.at_s:.1f} s", "bold"), f"  {harmless(sight.state)}"),
        Text(f"written      {_mib(sight.dirty_bytes_per_s)}/s; pages/s: {by_source}"),
        Text(f"working set  {working_sets}"),
        Text.assemble("migration    ", _forecast(sight)),
    ]
    for one in sight.blocks:
        name, size = harmless(one.block.name), _mib(one.block.size)
        said.append(Text(f"{name}, {size}, {_mib(one.data_bytes)} of it with data", style="dim"))
        said.append(strip([float(heat) for heat in one.history.strip(width)]))
    return said


def _forecast(sight: Sight) -> Text:
    f = sight.forecast
    at = f"at {_mib(sight.bytes_per_s)}/s"
    if not f.converges:
        return Text.assemble(
            ("does not converge ", "bold"),
            f"{at}: {f.downtime_ms:,.0f} ms of downtime, the limit is "
            f"{sight.limits.downtime_ms:,g} ms",
        )
    return Text.assemble(
        (f"{f.total_s:,.2f} s, downtime {f.downtime_ms:,.0f} ms ", "bold"),
        f"{at}; {_mib(f.sent_bytes)} in {f.rounds + 2} passes",
    )


def strip(heats: list[float]) -> Text:
    """A line of so many cells, each as high, and as bright, as it is hot.

    :param heats: 0 to 1
    """
    return Text.assemble(*((HEIGHTS[level(h)], _COLOURS[level(h)]) for h in heats), no_wrap=True)


def level(heat: float) -> int:
    """Which of :data:`HEIGHTS`: 0 for none at all, 8 for more than half."""
    if heat <= 0:
        return 0
    return min(8, max(1, 8 + math.ceil(math.log2(heat))))


def _mib(nbytes: float) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"
