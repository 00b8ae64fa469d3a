"""Everything compiled, before there is anything to be migrated.

The first time takes tens of seconds: not a thing to happen between two rounds. Numba keeps what it
compiled on disk, from where it is loaded in less than one.
"""

from __future__ import annotations

from tracker.bits import heat, history, regions, rescale, union
from tracker.bits import words as kernels
from tracker.memory import pagehash, pages

ROOMS = (kernels, union, rescale, pages, history, heat, regions, pagehash)
"""All that have kernels, but :mod:`tracker.answered.faults`, which a process of its own uses."""


def warm_up() -> None:
    """Compile every kernel, or load it from disk, for all types of argument that occur."""
    for room in ROOMS:
        room.warm_up()
