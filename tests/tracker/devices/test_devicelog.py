"""Device logs, against a stand-in at the ioctl boundary.

No device that finds anything for its log can be had without its hardware: of the kernel's sample
drivers one has a log, which stays empty, and QEMU's devices have none. So what is tested here is
the order of the calls, the bytes that go through them, and what becomes of failures. What a real
kernel answers for devices with and without a log is tested in the lab VM.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tracker import naive
from tracker.devices import devicelog
from tracker.devices.devicelog import DeviceLog, Span, merged
from tracker.errors import SourceError
from tracker.memory.ram import GuestRange, RamBlock

PAGE = 4096
NPAGES = 200
BLOCK = RamBlock("ram", NPAGES * PAGE, PAGE, hva=0x7F0000000000, device=1, inode=2)
SEEN = [  # with a hole, and a page that no device reaches
    GuestRange(0, 64 * PAGE, "ram", 0),
    GuestRange(64 * PAGE, 36 * PAGE, "ram", 64 * PAGE),
    GuestRange(1 << 32, 99 * PAGE, "ram", 100 * PAGE),
]
REACHED = set(range(199))

DEVICE_FEATURE = ord(";") << 8 | 117
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
START, STOP, REPORT = 6, 7, 8


class FakeDevice:
    """Decodes what a driver would be asked, as include/uapi/linux/vfio.h lays it out."""

    def __init__(self, most: int = 256) -> None:
        self.fd = os.open("/dev/null", os.O_RDWR)
        self.most = most
        self.logged: list[Span] | None = None
        self.starts: list[list[Span]] = []
        self.dirty: set[int] = set()  # IOVA // PAGE
        self.errors: dict[int, int] = {}  # feature -> errno
        self.reports_until_error = 1 << 30

    def feature(self, argument: bytearray) -> None:
        argsz, flags = struct.unpack_from("=II", argument)
        assert argsz == len(argument)
        feature, operation = flags & 0xFFFF, flags & ~0xFFFF
        if error := self.errors.get(feature):
            raise OSError(error, os.strerror(error))
        if operation & PROBE:
            assert (feature, operation) in ((START, PROBE | SET), (REPORT, PROBE | GET))
        elif (feature, operation) == (START, SET):
            self.start(argument)
        elif (feature, operation) == (STOP, SET):
            assert self.logged is not None
            assert argsz == 8
            self.logged = None
        elif (feature, operation) == (REPORT, GET):
            self.report(argument)
        else:
            raise AssertionError(f"unknown request {flags:#x}")

    def start(self, argument: bytearray) -> None:
        page_size, number, reserved, address = struct.unpack_from("=QIIQ", argument, 8)
        assert (len(argument), page_size, reserved) == (32, PAGE, 0)
        words = struct.unpack(f"={2 * number}Q", ctypes.string_at(address, 16 * number))
        ranges = list(zip(words[::2], words[1::2], strict=True))
        self.starts.append(ranges)
        if number > self.most:
            raise OSError(errno.E2BIG, "too many")
        if self.logged is not None:
            raise OSError(errno.EINVAL, "already")
        self.logged = ranges

    def report(self, argument: bytearray) -> None:
        iova, length, page_size, bitmap = struct.unpack_from("=QQQQ", argument, 8)
        assert (len(argument), page_size) == (40, PAGE)
        assert self.logged is not None
        assert any(a <= iova and iova + length <= a + size for a, size in self.logged)
        if self.reports_until_error == 0:
            raise OSError(errno.EIO, "the log overflowed")
        self.reports_until_error -= 1
        pages = range(iova // PAGE, (iova + length) // PAGE)
        bits = bytearray(ctypes.string_at(bitmap, (len(pages) + 7) // 8))
        for page in self.dirty.intersection(pages):
            bits[(page - pages[0]) // 8] |= 1 << (page - pages[0]) % 8
        self.dirty.difference_update(pages)
        ctypes.memmove(bitmap, bytes(bits), len(bits))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeDevice]:
    devices = {"one": FakeDevice(), "two": FakeDevice()}

    def ioctl(name: str, fd: int, request: int, argument: bytearray) -> int:
        assert request == DEVICE_FEATURE
        (device,) = (device for device in devices.values() if device.fd == fd)
        device.feature(argument)
        return 0

    monkeypatch.setattr(devicelog, "ioctl", ioctl)
    return devices


def source(fakes: dict[str, FakeDevice]) -> DeviceLog:
    return DeviceLog({name: device.fd for name, device in fakes.items()}, [BLOCK], SEEN)


def collected(log: DeviceLog) -> set[int]:
    (report,) = log.collect().items()
    assert report[0] == "ram"
    assert report[1].npages == NPAGES
    return naive.pages_of(report[1].words)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_what_any_device_wrote_is_reported_once(fakes: dict[str, FakeDevice]) -> None:
    log = source(fakes)
    log.start()
    assert fakes["one"].starts == [[(0, 100 * PAGE), (1 << 32, 99 * PAGE)]]
    assert collected(log) == set()
    high = (1 << 32) // PAGE
    fakes["one"].dirty = {0, 63, 64, 99, 150, high}  # 150 is in the hole
    fakes["two"].dirty = {1, high + 98, high + 99}
    assert collected(log) == {0, 63, 64, 99, 100, 1, 198}
    assert collected(log) == set()
    assert log.exact
    log.stop()
    log.stop()
    assert [device.logged for device in fakes.values()] == [None, None]
    assert not any(is_open(device.fd) for device in fakes.values())


def test_ranges_are_merged_until_the_device_takes_them(fakes: dict[str, FakeDevice]) -> None:
    fakes["two"].most = 1
    log = source(fakes)
    log.start()
    assert fakes["two"].starts == [
        [(0, 100 * PAGE), (1 << 32, 99 * PAGE)],
        [(0, (1 << 32) + 99 * PAGE)],
    ]
    fakes["two"].dirty = {3, 150}
    assert collected(log) == {3}
    log.stop()


@pytest.mark.parametrize("until_error", [0, 1, 2])
def test_a_failed_report_is_all_dirty_from_then_on(
    fakes: dict[str, FakeDevice], until_error: int
) -> None:
    """Each of the three ranges is the one whose report fails."""
    log = source(fakes)
    log.start()
    fakes["one"].reports_until_error = until_error
    assert collected(log) == REACHED
    assert not log.exact
    fakes["one"].reports_until_error = 1 << 30  # it answers again: its log is worth nothing
    assert collected(log) == REACHED
    log.stop()


@pytest.mark.parametrize("error", [errno.ENOTTY, errno.ENOMEM, errno.EINVAL, errno.ENODEV])
def test_a_start_that_fails_half_way_is_undone(fakes: dict[str, FakeDevice], error: int) -> None:
    fakes["two"].errors[START] = error
    log = source(fakes)
    with pytest.raises(SourceError, match=f"two: .*{os.strerror(error)}"):
        log.start()
    assert fakes["one"].starts
    assert fakes["one"].logged is None
    assert not any(is_open(device.fd) for device in fakes.values())
    with pytest.raises(SourceError):
        log.collect()


def test_a_log_that_somebody_else_has_is_left_to_them(fakes: dict[str, FakeDevice]) -> None:
    fakes["two"].logged = [(0, PAGE)]
    log = source(fakes)
    with pytest.raises(SourceError, match="two"):
        log.start()
    assert fakes["two"].logged == [(0, PAGE)]


def test_a_stop_that_fails_goes_on(fakes: dict[str, FakeDevice]) -> None:
    log = source(fakes)
    log.start()
    fakes["two"].errors[STOP] = errno.ENODEV
    log.stop()
    assert fakes["one"].logged is None
    assert not any(is_open(device.fd) for device in fakes.values())


@pytest.mark.parametrize("feature", [START, REPORT])
@pytest.mark.parametrize("error", [errno.ENOTTY, errno.EINVAL, errno.EIO])
def test_can_log(fakes: dict[str, FakeDevice], feature: int, error: int) -> None:
    device = fakes["one"]
    assert devicelog.can_log(device.fd)
    device.errors[feature] = error
    if error == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            devicelog.can_log(device.fd)
    else:
        assert not devicelog.can_log(device.fd)
    for one in fakes.values():
        os.close(one.fd)


def test_what_is_no_device_cannot_log() -> None:
    """With the real ioctl: ENOTTY."""
    fd = os.open("/dev/null", os.O_RDWR)
    log = DeviceLog({"null": fd}, [BLOCK], SEEN)
    with pytest.raises(SourceError, match=r"null: .*ioctl"):
        log.start()
    assert not is_open(fd)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 14),
)
def test_merged(steps: list[tuple[int, int]], most: int) -> None:
    ranges, at = [], 0
    for gap, size in steps:
        ranges.append((at + gap, size))
        at += gap + size
    result = merged(ranges, most)
    assert len(result) == min(most, len(ranges))

    def covered(spans: list[Span]) -> set[int]:
        return {i for start, size in spans for i in range(start, start + size)}

    assert covered(result) >= covered(ranges)
    left_out = sorted(b[0] - sum(a) for a, b in pairwise(result))
    gaps = sorted(gap for gap, _ in steps[1:])
    assert left_out == gaps[len(gaps) - len(left_out) :]  # the widest gaps stay
