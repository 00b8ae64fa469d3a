"""How many examples hypothesis looks at: few by default, many with ``--thorough``."""

from __future__ import annotations

import os

from hypothesis import settings

# No deadline: the first example of a test may have to compile its kernel, which takes seconds.
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=100)
# As plain Python the kernels only have to be right: they are tested on more examples compiled.
settings.register_profile("interpreted", deadline=None, max_examples=25)


def load_profile(thorough: bool) -> None:
    """Decide it for all tests of this process; before their modules are imported."""
    interpreted = os.environ.get("NUMBA_DISABLE_JIT") == "1"
    settings.load_profile("interpreted" if interpreted else "thorough" if thorough else "quick")


def examples(thorough: int) -> int:
    """As many as ``thorough`` in a thorough run, and a fitting part of them in another one."""
    return max(10, thorough * settings().max_examples // 100)
