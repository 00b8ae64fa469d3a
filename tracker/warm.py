"""Everything compiled, before there is anything to be migrated.

The first time takes tens of seconds: not a thing to happen between two rounds. Numba keeps what it
compiled on disk, from where it is loaded in less than one.
"""

from __future__ import annotations

from tracker import heat, history, kernels, pagehash, pages, regions, rescale, union

ROOMS = (kernels, union, rescale, pages, history, heat, regions, pagehash)
"""All that have kernels, but :mod:`tracker.faults` and what it uses, in a process of its own."""


def warm_up() -> None:
    """Compile every kernel, or load it from disk, for all types of argument that occur."""
    for room in ROOMS:
        room.warm_up()
