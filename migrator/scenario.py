"""A migration out of a configuration: start what is to be started, migrate, look, clean up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

from migrator.aio import in_thread, settle, within
from migrator.config import Config, MigrationConfig, VmConfig, parse_address
from migrator.errors import ConfigError, SourceUnreachable, Undecided, VmError
from migrator.guest.workload import Workload, boot_image, heartbeats
from migrator.link.session import Link
from migrator.migration.options import Options
from migrator.migration.orchestrator import migrate
from migrator.policy.judge import Limits
from migrator.qemu.accel import choose_accel
from migrator.qemu.process import RunDirectory, Vm, fill_in
from migrator.report.phases import Phase
from migrator.report.report import Progress, Report

_log = logging.getLogger(__name__)
_HEARTBEATS = 5  # so many have to be seen on each side
_GUEST_S = 30.0
_TERMINATE_S = 3.0  # for a preparation that is given up to end by itself
_KILL_S = 10.0


def cache_directory() -> Path:
    """Where what was built or fetched once is kept (XDG base directories)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "qemu-migrator"


async def run(
    config: Config,
    *,
    here: Path,
    say: Callable[[str], None] = lambda _: None,
    watch: Callable[[Progress], None] | None = None,
    dirty_map: bool = False,
) -> Report:
    """Do what a configuration says. Whatever was started and is not to be kept ends with it.

    :param here: the directory that relative paths in the configuration start from
    :param say: called with each step before the migration, for people
    :param dirty_map: have in the report where memory was dirty
    :raise ConfigError: it cannot be done
    :raise SourceUnreachable: the source cannot be started, or ends before anything was begun
    :raise MigratorError: see :func:`migrator.migration.orchestrator.migrate`
    """
    for command in config.prepare:
        say(f"preparing: {command}")
        await _prepare(command, here)
    async with AsyncExitStack() as stack:
        run_directory = RunDirectory()
        directory = stack.enter_context(run_directory)
        say("starting")
        with _nothing_begun(config):
            values = await _values(config, directory, here)
            source, source_qmp = await _provide("source", config.source, values, directory, stack)
        if source is not None and config.source.keep:
            # whatever comes: until it has moved it is the only one
            stack.callback(_keep, source, run_directory, say)
        destination: Vm | None = None
        place: str | Link
        if config.destination is not None:
            destination, place = await _provide(
                "destination", config.destination, values, directory, stack
            )
        else:
            place = _link(config, here)
        if source is not None:
            say(f"the source runs (process {source.pid}); waiting until its guest is ready")
            await _ready_or_ended(source, config)
            await asyncio.sleep(config.migration.settle_s)
        say("migrating")
        options = options_of(config.migration, dirty_map=dirty_map)
        report = await migrate(source_qmp, place, options, watch=watch)
        try:
            if source is not None and destination is not None and config.guest is not None:
                # in a rehearsal the guest goes on where it was
                there = source if report.memory_only else destination
                report.guest = await _heartbeat_goes_on(source, there)
            if destination is not None and not report.memory_only:
                await _alive(destination, config, say)
        except VmError as error:
            raise _not_well(error, report) from error
        except asyncio.CancelledError:
            say("interrupted while watching the destination; it has moved")
        if destination is not None and config.destination and config.destination.keep:
            _keep(destination, run_directory, say)
    return report


@contextlib.contextmanager
def _nothing_begun(config: Config) -> Iterator[None]:
    """Within the block, a source that is to be started and cannot be is one that is not there."""
    try:
        yield
    except VmError as error:
        if config.source.command is None:
            raise
        raise SourceUnreachable(error.vm, error.reason) from error


async def _ready_or_ended(source: Vm, config: Config) -> None:
    try:
        await _ready(source, config)
    except VmError:
        with _nothing_begun(config):
            source.check_alive()
        raise


def _keep(vm: Vm, run_directory: RunDirectory, say: Callable[[str], None]) -> None:
    say(f"the {vm.name} stays: process {vm.pid}, QMP socket {vm.qmp}")
    run_directory.keep_for(vm.pid)
    vm.let_go()


def _not_well(error: VmError, report: Report) -> Undecided:
    undecided = Undecided(
        Phase.FINISH.value,
        str(error),
        ["the migration completed, the source will not run", "the guest is not well"],
    )
    report.status, report.reason, report.known = "failed", str(error), list(undecided.known)
    undecided.report = report
    return undecided


async def _prepare(command: str, here: Path) -> None:
    process = await asyncio.create_subprocess_shell(
        command, cwd=here, stdin=asyncio.subprocess.DEVNULL, stdout=2, start_new_session=True
    )
    try:
        status = await process.wait()
    except asyncio.CancelledError:
        await settle(_end_group(process), too_late=True)
        raise
    if status:
        raise ConfigError(f"{command!r} ended with {status}", key="prepare")


async def _end_group(leader: asyncio.subprocess.Process) -> None:
    """End a process and all that it has started; return when none of them runs any more."""
    for ending, patience_s in ((signal.SIGTERM, _TERMINATE_S), (signal.SIGKILL, _KILL_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, ending)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if not await in_thread(_group_runs, leader.pid):
                await leader.wait()
                return
            await asyncio.sleep(0.01)


def _group_runs(group: int) -> bool:
    """Whether a process of the group runs. One that ended and is not reaped yet does not."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state not in "ZX":
            return True
    return False


async def _values(config: Config, directory: Path, here: Path) -> dict[str, str]:
    values = {"run": str(directory), "cache": str(cache_directory()), "here": str(here)}
    vms = (config.source, config.destination)
    commands = [vm.command for vm in vms if vm is not None and vm.command]
    if any("{accel}" in argument for command in commands for argument in command):
        try:
            choice = await choose_accel(commands[0][0], config.accel)
        except OSError as error:
            raise VmError(commands[0][0], f"cannot be started: {error.strerror}") from error
        _log.info("accelerator %s: %s", choice.name, choice.reason)
        values["accel"] = choice.name
    if config.guest is not None:
        image = directory / "guest.img"
        image.write_bytes(boot_image(_workload(config)))
        values["guest"] = str(image)
    return values


def _workload(config: Config) -> Workload:
    assert config.guest is not None
    try:
        return Workload(
            working_set_bytes=config.guest.working_set, pages_per_s=config.guest.pages_per_s
        )
    except ValueError as error:
        raise ConfigError(str(error), key="guest") from error


async def _provide(
    name: str, wanted: VmConfig, values: dict[str, str], directory: Path, stack: AsyncExitStack
) -> tuple[Vm | None, str]:
    if wanted.command is None:
        assert wanted.qmp is not None
        return None, wanted.qmp
    vm = Vm(name, directory)
    # unless it is let go; a signal that comes meanwhile does not change what became of the VM
    stack.push_async_callback(lambda: settle(vm.stop(), too_late=True))
    await vm.start(
        fill_in(wanted.command, {**values, "console": str(vm.console)}),
        incoming=name == "destination",
        keep=wanted.keep,
    )
    return vm, vm.qmp


async def _ready(source: Vm, config: Config) -> None:
    console = config.source.console
    if console.ready is not None:
        await source.wait_for_console(
            console.ready, timeout_s=console.timeout_s, broken=console.broken
        )
    if config.guest is not None:
        await _count_heartbeats(lambda: source.console.read_bytes(), source, _HEARTBEATS)


async def _alive(destination: Vm, config: Config, say: Callable[[str], None]) -> None:
    assert config.destination is not None
    console = config.destination.console
    if console.alive is not None:
        say("the destination runs; watching its console")
        await destination.wait_for_console(
            console.alive, timeout_s=console.timeout_s, broken=console.broken
        )


async def _heartbeat_goes_on(source: Vm, there: Vm) -> dict[str, int]:
    """Check that the consoles, one after the other, are one sequence of heartbeats.

    :param there: where the guest runs now: the destination, or the source still
    """
    before = source.console.read_bytes()
    moved = before if there is not source else b""
    try:
        last = heartbeats(before)[-1]
    except (ValueError, IndexError) as error:
        raise VmError("source", f"its heartbeats: {error}") from error
    beats = await _count_heartbeats(
        lambda: moved + there.console.read_bytes(), there, last + 1 + _HEARTBEATS
    )
    gap = next((n for n, beat in enumerate(beats) if n != beat), None)
    if gap is not None:
        raise VmError(there.name, f"the guest's heartbeat went from {gap - 1} to {beats[gap]}")
    return {"heartbeats_before": last + 1, "heartbeats_after": len(beats) - last - 1}


async def _count_heartbeats(read: Callable[[], bytes], vm: Vm, wanted: int) -> list[int]:
    async def beats() -> list[int]:
        while len(found := heartbeats(read())) < wanted:
            vm.check_alive()
            await asyncio.sleep(0.02)
        return found

    try:
        return await within(_GUEST_S, beats())
    except ValueError as error:
        raise VmError(vm.name, str(error)) from error
    except asyncio.TimeoutError as error:
        raise VmError(vm.name, f"no {wanted} heartbeats in {_GUEST_S:g} s") from error


def _link(config: Config, here: Path) -> Link:
    link = config.link
    assert link is not None
    host, port = parse_address(link.to)
    return Link(
        host,
        port,
        tls=str((here / link.tls).resolve()) if link.tls is not None else None,
        peer=link.peer,
        streams=link.streams,
        compress=link.compress,
        bandwidth_bytes_per_s=link.bandwidth,
        reconnect_s=link.reconnect_s,
        silence_s=link.silence_s,
    )


def options_of(chosen: MigrationConfig, *, dirty_map: bool = False) -> Options:
    """What was chosen, in a file or on the command line, as a migration takes it."""
    return Options(
        limits=Limits(
            downtime_ms=chosen.downtime_limit_ms,
            max_rounds=chosen.max_rounds,
            max_seconds=chosen.max_seconds,
            on_limit=chosen.on_limit,
        ),
        verify=chosen.verify,
        memory_only=chosen.memory_only,
        tracker=chosen.tracker,
        policy=chosen.policy,
        throttle_percent=chosen.throttle,
        dirty_map=dirty_map,
        standstill_s=chosen.max_standstill_s,
    )
