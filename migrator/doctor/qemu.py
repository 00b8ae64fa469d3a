"""What QEMU can, asked of one without a machine."""

from __future__ import annotations

import os

from migrator.aio import in_thread
from migrator.doctor.check import Check
from migrator.doctor.host import SHM
from migrator.errors import CommandFailed, VmError
from migrator.qemu.accel import choose_accel
from migrator.qemu.process import RunDirectory, Vm
from migrator.qemu.qmp import Qmp
from tracker.errors import RamError
from tracker.memory.ram import find_block

CAPABILITIES = ("events", "pause-before-switchover", "x-ignore-shared")
COMMANDS = (
    "cont",
    "getfd",
    "human-monitor-command",
    "migrate",
    "migrate-continue",
    "migrate-incoming",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "migrate_cancel",
    "qom-get",
    "query-block-exports",
    "query-block-jobs",
    "query-cpus-fast",
    "query-jobs",
    "query-memdev",
    "query-migrate",
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "query-named-block-nodes",
    "query-status",
    "query-target",
    "quit",
    "stop",
    "x-query-ramblock",
)
"""What QEMU is asked in a migration."""


_NEWER_QEMU = "use a QEMU that has them, and name it with --qemu"


async def accelerator_checks(qemu: str) -> list[Check]:
    """KVM or TCG: a guest runs under either."""
    try:
        choice = await choose_accel(qemu)
    except OSError as error:
        return [Check("accelerator", "failed", str(error), "name a QEMU that starts with --qemu")]
    seen = f"{choice.name.upper()}: {choice.reason}"
    return [Check("accelerator", "passed", seen)]


async def qemu_checks(qemu: str) -> list[Check]:
    """What QEMU can, asked of one without a machine."""
    with RunDirectory() as directory:
        vm = Vm("probe", directory)
        try:
            arguments = ["-machine", "none", "-S", "-nodefaults", "-display", "none"]
            await vm.start([qemu, *arguments], incoming=False)
            qmp = await Qmp.connect(qemu, vm.qmp)
            try:
                return [
                    await _version(qmp),
                    await _capabilities(qmp),
                    await _commands(qmp),
                    await _shared_ram(qmp),
                ]
            finally:
                await qmp.close()
        except VmError as error:
            mend = "install QEMU (Debian: qemu-system-x86), or name one with --qemu"
            return [Check("QEMU", "failed", error.reason, mend)]
        finally:
            await vm.stop()


async def _version(qmp: Qmp) -> Check:
    answer = await qmp.execute("query-version")
    number = "{major}.{minor}.{micro}".format(**answer["qemu"])
    return Check("QEMU", "passed", f"{qmp.name} says {number} {answer['package']}".rstrip())


async def _capabilities(qmp: Qmp) -> Check:
    name = "QEMU's capabilities"
    missing = sorted(set(CAPABILITIES).difference(await qmp.capabilities()))
    if missing:
        return Check(name, "failed", f"it lacks {', '.join(missing)}", _NEWER_QEMU)
    try:
        await qmp.set_capabilities(dict.fromkeys(CAPABILITIES, True))
    except CommandFailed as error:
        return Check(name, "failed", str(error), _NEWER_QEMU)
    return Check(name, "passed", f"{', '.join(CAPABILITIES)} can be turned on")


async def _commands(qmp: Qmp) -> Check:
    name = "QEMU's commands"
    there = {command["name"] for command in await qmp.execute("query-commands")}
    missing = sorted(set(COMMANDS).difference(there))
    if missing:
        return Check(name, "failed", f"it lacks {', '.join(missing)}", _NEWER_QEMU)
    return Check(name, "passed", f"all {len(COMMANDS)} that a migration uses")


async def _shared_ram(qmp: Qmp) -> Check:
    name = "RAM as a shared file"
    size = 16 * os.sysconf("SC_PAGE_SIZE")
    try:
        await qmp.execute(
            "object-add",
            qom_type="memory-backend-file",
            id="probe",
            size=size,
            share=True,
            mem_path=SHM,
        )
        (backend,) = await qmp.memory_backends()
        await in_thread(find_block, qmp.pid, backend.name, backend.size, backend.mem_path)
    except CommandFailed as error:
        mend = f"QEMU must be able to make files in {SHM}, and have memory-backend-file"
        return Check(name, "failed", str(error), mend)
    except (RamError, OSError) as error:
        return Check(name, "failed", str(error), "run this program as QEMU's user, or as root")
    return Check(name, "passed", f"memory-backend-file in {SHM}, found again in QEMU's memory")
