"""How many examples hypothesis looks at: few by default, many with ``--thorough``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from hypothesis import settings

_T = TypeVar("_T")

# No deadline: the first example of a test may have to compile its kernel, which takes seconds.
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=100)
# As plain Python the kernels only have to be right: they are tested on more examples compiled.
settings.register_profile("interpreted", deadline=None, max_examples=10)


def load_profile(thorough: bool) -> None:
    """Decide it for all tests of this process; before their modules are imported."""
    interpreted = os.environ.get("NUMBA_DISABLE_JIT") == "1"
    settings.load_profile("interpreted" if interpreted else "thorough" if thorough else "quick")


def examples(thorough: int) -> int:
    """As many as ``thorough`` in a thorough run, and a fitting part of them in another one."""
    return max(10, thorough * settings().max_examples // 100)


def few(items: Sequence[_T], most: int) -> Sequence[_T]:
    """All of them in a thorough run; in another one as many as ``most``, from all along."""
    if settings().max_examples >= 100 or len(items) <= most:
        return items
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]
