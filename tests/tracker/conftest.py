from __future__ import annotations

import os

from hypothesis import settings

# The first example of a test may have to compile its kernel, which takes seconds. As plain Python
# the kernels only have to be right, and have been tested on more examples compiled.
settings.register_profile("compiled", deadline=None)
settings.register_profile("interpreted", deadline=None, max_examples=25)
settings.load_profile("interpreted" if os.environ.get("NUMBA_DISABLE_JIT") == "1" else "compiled")
