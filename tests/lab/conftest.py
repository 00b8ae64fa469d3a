"""What of the lab's tests is collected where.

``inside`` runs in the lab VM, on its kernel and with its devices, and nowhere else; the other tests
boot that VM, or need what its kernel was built with. ``./run lab`` says which of the two is meant,
and ``./run test`` collects neither.
"""

from __future__ import annotations

import os

_side = os.environ.get("MIGRATOR_LAB")
_SIDES = {"inside": ["inside"], "outside": ["test_boot.py", "test_headers.py"]}
collect_ignore = [path for side, paths in _SIDES.items() if side != _side for path in paths]
