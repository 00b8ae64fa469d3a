"""Programs that migrate and kill themselves with SIGKILL when a phase is entered."""

from __future__ import annotations

ORCHESTRATOR = """
import asyncio, os, signal, sys
from migrator import Limits, Options, migrate
source, destination, phase = sys.argv[1:]
options = Options(limits=Limits(on_limit="force"), verify=True)
def watch(progress):
    if progress.phase == phase:
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(migrate(source, destination, options, watch=watch))
"""
"""Arguments: the two QMP sockets, and the name of the phase."""

WITH_ITS_GUARD = ORCHESTRATOR.replace(
    "    if progress.phase == phase:\n",
    "    if progress.phase == 'final-send':\n        os.kill(guards[0], signal.SIGKILL)\n",
).replace(
    "source, destination, phase = sys.argv[1:]",
    """source, destination = sys.argv[1:]
import subprocess
from migrator.migration import guard
guards = []
class Popen(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if any("migrator.migration.guard" in word for word in args[0]):
            guards.append(self.pid)
guard.subprocess.Popen = Popen
""",
)
"""Arguments: the two QMP sockets. The guard is killed too, before the last pages are sent."""
