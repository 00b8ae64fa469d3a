"""The workload guest's image, and the oracles over what it leaves behind."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrator.guest.bootsector import FULL_SPEED, PIT_HZ, assemble
from migrator.guest.edu import WORDS
from migrator.guest.workload import (
    MIB,
    PAGE_SIZE,
    Workload,
    boot_image,
    check_dma,
    check_walk,
    drive_args,
    guest_args,
    heartbeats,
    low_ram_bytes,
)

GIB = 1 << 30


# --- Workload ---


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"working_set_bytes": 0}, "working_set_bytes is 0"),
        ({"working_set_bytes": PAGE_SIZE + 1}, "multiple of the page size"),
        ({"start": -PAGE_SIZE}, "start is -4096"),
        ({"start": 16 * MIB + 512}, "multiple of the page size"),
        ({"start": MIB - PAGE_SIZE}, "choose 0x100000 or more"),
        (
            {"start": 2 * GIB, "working_set_bytes": GIB + PAGE_SIZE},
            f"make working_set_bytes at most {GIB}",
        ),
        ({"pages_per_s": -1}, "or 0 for full speed"),
        ({"pages_per_s": 1 << 31}, "or 0 for full speed"),
        ({"heartbeat_ms": 0}, "choose 1 to 60000"),
        ({"heartbeat_ms": 60_001}, "choose 1 to 60000"),
        ({"dma_pages": -1}, "dma_pages is -1"),
        ({"dma_start": 8 * MIB + 1}, "dma_start is .* multiple of the page size"),
        ({"dma_start": MIB - PAGE_SIZE}, "dma_start is 0xff000: choose 0x100000 or more"),
        ({"dma_pages": 2, "dma_start": 256 * MIB - PAGE_SIZE}, "up to 0x10001000, but reaches"),
        ({"dma_pages": 2, "dma_start": 16 * MIB - PAGE_SIZE}, "within the working set"),
        ({"dma_pages": 1, "dma_start": 80 * MIB - PAGE_SIZE}, "within the working set"),
    ],
)
def test_senseless_workloads_are_refused(fields: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Workload(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"start": MIB, "working_set_bytes": PAGE_SIZE},
        {"start": 2 * GIB, "working_set_bytes": GIB},
        {"pages_per_s": (1 << 31) - 1, "heartbeat_ms": 60_000},
        {"pages_per_s": 1, "heartbeat_ms": 1},
        {"dma_pages": 2048},
        {"dma_pages": 1, "dma_start": 80 * MIB},
        {"dma_pages": 1, "dma_start": 256 * MIB - PAGE_SIZE},
        {"dma_pages": 0, "dma_start": 512 * MIB},
    ],
)
def test_workloads_at_the_limits_assemble(fields: dict[str, Any]) -> None:
    workload = Workload(**fields)
    assert workload.npages * PAGE_SIZE == workload.working_set_bytes
    assert boot_image(workload)


@pytest.mark.parametrize(
    ("ram_bytes", "machine", "low"),
    [
        (256 * MIB, "q35", 256 * MIB),
        (0xAFF0_0000, "pc-q35-7.2", 0xAFF0_0000),
        (0xB000_0000, "q35", 2 * GIB),
        (0xB000_0000, "pc", 0xB000_0000),
        (0xE000_0000, "pc-i440fx-7.2", 3 * GIB),
        (64 * GIB, "pc", 3 * GIB),
    ],
)
def test_low_ram(ram_bytes: int, machine: str, low: int) -> None:
    assert low_ram_bytes(ram_bytes, machine) == low


def test_the_working_set_must_fit_the_vm() -> None:
    workload = Workload(start=16 * MIB, working_set_bytes=64 * MIB)
    workload.check_fits(98 * MIB, "q35")
    with pytest.raises(ValueError, match=f"working_set_bytes smaller by {MIB}"):
        workload.check_fits(97 * MIB, "q35")
    beyond_q35 = Workload(start=16 * MIB, working_set_bytes=2 * GIB)
    beyond_q35.check_fits(8 * GIB, "pc")
    with pytest.raises(ValueError, match="room for it only up to 0x7ee00000"):
        beyond_q35.check_fits(8 * GIB, "q35")


def test_the_region_of_the_device_must_fit_the_vm() -> None:
    workload = Workload(working_set_bytes=MIB, dma_pages=256, dma_start=40 * MIB)
    workload.check_fits(59 * MIB, "q35")
    with pytest.raises(ValueError, match="make dma_pages or dma_start smaller"):
        workload.check_fits(58 * MIB, "q35")


@given(
    st.integers(min_value=1, max_value=(1 << 31) - 1),
    st.integers(min_value=1, max_value=60_000),
)
def test_rate_and_heartbeat_survive_the_units_of_the_code(rate: int, heartbeat_ms: int) -> None:
    p = Workload(pages_per_s=rate, heartbeat_ms=heartbeat_ms).parameters
    assert 1 <= p.pit_divisor <= 0xFFFF
    tick_s = Fraction(p.pit_divisor, PIT_HZ)
    assert abs(tick_s * p.ticks_per_heartbeat * 1000 / heartbeat_ms - 1) < Fraction(1, 1000)
    assert 0 <= p.budget < FULL_SPEED
    assert 0 <= p.budget_fraction < 1 << 32
    # Less than one in a million short, or one page in half a year.
    pages_per_s = (p.budget + Fraction(p.budget_fraction, 1 << 32)) / tick_s
    assert rate - Fraction(rate, 10**6) - Fraction(1, 10**6) <= pages_per_s <= rate


def test_full_speed_is_a_budget_no_tick_uses_up() -> None:
    p = Workload(pages_per_s=0).parameters
    assert (p.budget, p.budget_fraction) == (FULL_SPEED, 0)


# --- image and arguments ---


def test_image_is_the_sector_and_nothing_else() -> None:
    workload = Workload(working_set_bytes=8 * MIB, start=32 * MIB, pages_per_s=1234)
    image = boot_image(workload)
    assert len(image) == MIB
    assert image[:512] == assemble(workload.parameters)
    assert image[510:512] == b"\x55\xaa"
    assert not any(image[512:])
    assert (32 * MIB).to_bytes(4, "little") in image
    assert (40 * MIB).to_bytes(4, "little") in image


def test_image_with_a_device_to_drive_is_two_sectors() -> None:
    plain = Workload()
    with_dma = Workload(dma_pages=4)
    image = boot_image(with_dma)
    assert len(image) == MIB
    assert image[:1024] == assemble(with_dma.parameters)
    assert any(image[512:1024])
    assert not any(image[1024:])
    assert boot_image(Workload(dma_start=32 * MIB)) == boot_image(plain)


def test_drive_is_read_only_and_takes_no_locks() -> None:
    drive = drive_args("/tmp/a,b.img")[1].split(",", 5)
    assert "readonly=on" in drive
    assert "file.locking=off" in drive
    assert drive[-1] == "file=/tmp/a,,b.img"


def test_guest_args_contain_the_drive() -> None:
    assert guest_args("x")[-4:] == drive_args("x")


# --- heartbeats ---


def beats(start: int, stop: int) -> bytes:
    return b"".join(b"%08x\n" % n for n in range(start, stop))


@given(st.integers(0, 40), st.integers(0, 400))
def test_heartbeats_of_output_cut_anywhere(count: int, cut: int) -> None:
    serial = beats(0, count)[:cut]
    assert heartbeats(serial) == list(range(len(serial) // 9))


@given(st.integers(0, 40), st.integers(0, 400))
def test_a_line_begun_at_the_source_may_end_at_the_destination(count: int, cut: int) -> None:
    serial = beats(0, count)
    source, destination = serial[:cut], serial[cut:]
    assert heartbeats(source + destination) == list(range(count))


def test_gaps_and_repetitions_are_kept() -> None:
    assert heartbeats(beats(0, 3) + beats(2, 3) + beats(7, 8)) == [0, 1, 2, 2, 7]
    assert heartbeats(b"ffffffff\n00000000\n") == [0xFFFF_FFFF, 0]


@pytest.mark.parametrize(
    ("serial", "at"),
    [
        (b"00000000\nSeaBIOS\n", 9),
        (b"0000000A\n", 0),
        (b"0000000\n", 0),
        (b"000000000\n", 0),
        (b"00000000\r\n", 0),
        (b"\n", 0),
        (b"00000000\n00000001\n0000000x", 18),
        (b"00000000\n000000011", 9),
    ],
)
def test_anything_else_is_an_error_that_says_where(serial: bytes, at: int) -> None:
    with pytest.raises(ValueError, match=f"at byte {at} of"):
        heartbeats(serial)


def test_a_guest_without_its_device_is_an_error_of_its_own() -> None:
    assert heartbeats(b"") == []
    with pytest.raises(ValueError, match="at byte 0 of"):
        heartbeats(b"no e")
    with pytest.raises(ValueError, match="found no edu device"):
        heartbeats(b"no edu\n")
    with pytest.raises(ValueError, match="found no edu device"):
        heartbeats(beats(0, 2) + b"no edu\n")  # after a reset


# --- check_walk ---


def ram_of(values: list[int]) -> tuple[NDArray[np.uint8], Workload]:
    """Make RAM with the values in a working set at 1 MiB, and garbage everywhere else."""
    workload = Workload(start=MIB, working_set_bytes=len(values) * PAGE_SIZE)
    ram = np.full(workload.end + PAGE_SIZE, 0x5A, np.uint8)
    ram[workload.start : workload.end : PAGE_SIZE] = values
    return ram, workload


def walked(npages: int, writes: int) -> list[int]:
    """Walk, one write at a time."""
    values = [0] * npages
    for n in range(writes):
        values[n % npages] = (values[n % npages] + 1) % 256
    return values


@given(st.integers(1, 9), st.integers(0, 2500))
def test_any_walk_is_ok(npages: int, writes: int) -> None:
    ram, workload = ram_of(walked(npages, writes))
    check = check_walk(ram, workload)
    assert check.ok
    assert check.position == writes % npages
    assert check.edges == (writes % npages != 0)
    assert check.value == -(-writes // npages) % 256


@given(st.lists(st.sampled_from([0, 1, 2, 254, 255]), min_size=1, max_size=6))
def test_ok_is_exactly_what_some_walk_leaves(values: list[int]) -> None:
    npages = len(values)
    possible = any(
        [(v + (i < p)) % 256 for i in range(npages)] == values
        for v in range(256)
        for p in range(npages)
    )
    ram, workload = ram_of(values)
    check = check_walk(ram, workload)
    assert check.ok == possible
    assert check.ok == (not check.problem)


@pytest.mark.parametrize(
    ("values", "edges", "says"),
    [
        ([5, 5, 4, 4, 3, 3], 2, "2 edges, after pages 1, 3"),
        ([5, 3, 3], 1, "page 0 is at 5, but page 1 at 3"),
        ([4, 5, 5], 1, "page 0 is at 4, but page 1 at 5"),
        ([5, 5, 4, 5, 5], 2, "page 2 is at 4, but page 3 at 5"),
        ([255, 0], 1, "page 0 is at 255, but page 1 at 0"),
        (list(range(30, 10, -1)), 19, "19 edges, after pages 0, 1, 2, 3, 4, 5, 6, 7, ..."),
    ],
)
def test_what_no_walk_leaves_is_named(values: list[int], edges: int, says: str) -> None:
    ram, workload = ram_of(values)
    check = check_walk(ram, workload)
    assert not check.ok
    assert check.edges == edges
    assert check.problem.startswith(says)


def test_counters_wrap() -> None:
    ram, workload = ram_of([0, 0, 255])
    check = check_walk(ram, workload)
    assert check.ok
    assert (check.edges, check.position) == (1, 2)


def test_ram_too_small_for_the_working_set() -> None:
    ram, workload = ram_of([1, 1])
    with pytest.raises(ValueError, match="do not hold"):
        check_walk(ram[: workload.end - 1], workload)


# --- check_dma ---


def dma_of(passes: list[int]) -> tuple[NDArray[np.uint8], Workload]:
    """Make RAM with pages of these passes at 1 MiB, and garbage everywhere else."""
    workload = Workload(working_set_bytes=MIB, dma_pages=len(passes), dma_start=MIB)
    ram = np.full(workload.dma_end + PAGE_SIZE, 0x5A, np.uint8)
    words = np.repeat(np.array(passes, "<u4"), PAGE_SIZE // 4)
    ram[workload.dma_start : workload.dma_end] = words.view(np.uint8)
    ram.view("<u4")[(workload.dma_start >> 2) + WORDS :: PAGE_SIZE // 4] = 0  # never written
    return ram, workload


def device_wrote(npages: int, writes: int) -> list[int]:
    """Let a device write, one page at a time."""
    passes = [0] * npages
    for n in range(writes):
        passes[n % npages] = n // npages + 1
    return passes


@given(st.integers(1, 9), st.integers(0, 60))
def test_all_that_a_device_leaves_is_counted(npages: int, writes: int) -> None:
    assert check_dma(*dma_of(device_wrote(npages, writes))) == writes


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_nothing_else_is(passes: list[int]) -> None:
    possible = any(device_wrote(len(passes), n) == passes for n in range(4 * len(passes)))
    try:
        check_dma(*dma_of(passes))
    except ValueError:
        assert not possible
    else:
        assert possible


def test_passes_beyond_31_bits() -> None:
    assert check_dma(*dma_of([0xF000_0001, 0xF000_0000])) == 2 * 0xF000_0000 + 1


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ([3, 3, 2, 1], "page 3 of the device's is at pass 1, not at 2 as after 2 pages of pass 3"),
        ([3, 2, 3, 2], "page 1 of the device's is at pass 2, not at 3"),
        ([3, 1, 1], "page 1 of the device's is at pass 1, not at 2"),
        ([0, 1], "page 1 of the device's is at pass 1, not at 0 as after 1 pages"),
    ],
)
def test_what_no_device_leaves_is_named(passes: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_dma(*dma_of(passes))


@pytest.mark.parametrize("at", [0, 3, 2048, 4 * WORDS - 1])
def test_a_page_half_written_is_an_error(at: int) -> None:
    ram, workload = dma_of([2, 2, 1])
    ram[workload.dma_start + PAGE_SIZE + at] ^= 4
    with pytest.raises(ValueError, match="page 1 of the device's is not all of one pass"):
        check_dma(ram, workload)


def test_no_region_and_no_room_for_it() -> None:
    ram, workload = dma_of([1, 1])
    with pytest.raises(ValueError, match="do not hold"):
        check_dma(ram[: workload.dma_end - 1], workload)
    with pytest.raises(ValueError, match="was to write nothing"):
        check_dma(ram, Workload())
