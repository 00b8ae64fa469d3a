"""Reading a type 1 container: what can be tested without one. The rest is in the lab VM's tests."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

import pytest

from tests.tracker import naive
from tracker.devices import vfio
from tracker.devices.vfio import Type1Info, VfioType1, iommu_info, parse_info
from tracker.errors import SourceError
from tracker.memory.ram import GuestRange, RamBlock

PAGE = 4096
NPAGES = 200
BLOCK = RamBlock("ram", NPAGES * PAGE, PAGE, hva=0x7F0000000000, device=1, inode=2)
SEEN = [GuestRange(0, 100 * PAGE, "ram", 0), GuestRange(1 << 32, 100 * PAGE, "ram", 100 * PAGE)]
LIMIT_BYTES = 1 << 10  # 8192 pages: the two ranges are more than that apart

# include/uapi/linux/vfio.h, as the kernel lays it out
HEAD = "=IIQII"
MIGRATION = struct.pack("=HHIIIQQ", 2, 1, 56, 0, 0, PAGE, LIMIT_BYTES)
USABLE = struct.pack("=HHIIIQQQQ", 1, 1, 104, 2, 0, 0, 0xFEDFFFFF, 0xFEF00000, 2**39 - 1)
AVAIL = struct.pack("=HHII", 3, 1, 0, 65535)
INFO = struct.pack(HEAD, 116, 3, PAGE | 1 << 21 | 1 << 30, 24, 0) + MIGRATION + USABLE + AVAIL


def test_capabilities() -> None:
    assert parse_info(INFO) == Type1Info(
        page_sizes=PAGE | 1 << 21 | 1 << 30,
        dirty_page_sizes=PAGE,
        max_bitmap_bytes=LIMIT_BYTES,
        usable=((0, 0xFEDFFFFF), (0xFEF00000, 2**39 - 1)),
        dma_avail=65535,
    )


def test_no_capabilities() -> None:
    """Before v5.1, and where the flag is missing the offset means nothing."""
    info = struct.pack(HEAD, 24, 1, PAGE, 999, 0)
    assert parse_info(info) == Type1Info(PAGE, 0, 0, (), -1)


@pytest.mark.parametrize(
    "info",
    [
        struct.pack(HEAD, 116, 3, PAGE, 200, 0),  # the first lies outside
        INFO[:60],  # the second does
        INFO[:-4],  # the last in part
        INFO.replace(struct.pack("=HHI", 3, 1, 0), struct.pack("=HHI", 3, 1, 24)),  # a ring
    ],
)
def test_a_broken_chain(info: bytes) -> None:
    with pytest.raises(ValueError, match=r"Buffer size too small|ring"):
        parse_info(info)


class FakeContainer:
    """Two mappings, and failures in an order that no real container can be brought to."""

    def __init__(self) -> None:
        self.fd = os.open("/dev/null", os.O_RDWR)
        self.tracking = False
        self.dirty: set[int] = set()  # IOVA // PAGE
        self.always: set[int] = set()
        self.errors: list[tuple[str, int]] = []  # (call, errno) of calls to come
        self.calls: list[str] = []

    def ioctl(self, name: str, fd: int, request: int, argument: object) -> int:
        assert fd == self.fd
        self.calls.append(name)
        if self.errors and self.errors[0][0] in name:
            error = self.errors.pop(0)[1]
            if error:
                raise OSError(error, f"{name}: {os.strerror(error)}")
        if request == ord(";") << 8 | 112:
            assert isinstance(argument, bytearray)
            if len(argument) >= len(INFO):
                argument[: len(INFO)] = INFO
            else:  # as the kernel tells that there is more
                struct.pack_into(HEAD, argument, 0, len(INFO), 3, PAGE, 0, 0)
        elif "START" in name or "STOP" in name:
            assert request == ord(";") << 8 | 117
            self.tracking = "START" in name
        else:
            assert isinstance(argument, ctypes.Structure)
            self.get_bitmap(bytes(argument))
        return 0

    def get_bitmap(self, argument: bytes) -> None:
        argsz, flags, iova, size, page_size, nbytes, data = struct.unpack("=IIQQQQQ", argument)
        assert (argsz, flags, page_size) == (48, 4, PAGE)
        pages = range(iova // PAGE, (iova + size) // PAGE)
        assert nbytes == (len(pages) + 63) // 64 * 8
        if not self.tracking or nbytes > LIMIT_BYTES:
            raise OSError(errno.EINVAL, "EINVAL")
        found = (self.dirty | self.always).intersection(pages)
        self.dirty -= found
        words = naive.words_of({page - pages[0] for page in found}, len(pages))
        ctypes.memmove(data, words.tobytes(), words.nbytes)


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> FakeContainer:
    fake = FakeContainer()
    monkeypatch.setattr(vfio, "ioctl", fake.ioctl)
    return fake


def collected(source: VfioType1) -> set[int]:
    return naive.pages_of(source.collect()["ram"].words)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_readings_are_split_at_the_limit_of_the_bitmap(container: FakeContainer) -> None:
    source = VfioType1(container.fd, [BLOCK], SEEN)
    source.start()
    high = (1 << 32) // PAGE
    container.dirty = {0, 99, 100, high, high + 99, high + 100}
    assert collected(source) == {0, 99, 100, 199}
    assert collected(source) == set()
    assert source.exact
    source.stop()
    assert not container.tracking
    assert not is_open(container.fd)


def test_what_is_always_dirty_is_no_news(container: FakeContainer) -> None:
    container.always = {1, 2}
    source = VfioType1(container.fd, [BLOCK], SEEN)
    source.start()
    assert not source.exact
    assert collected(source) == {1, 2}
    source.stop()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("GET_INFO", errno.EINVAL),
        ("GET_INFO", errno.ENOTTY),
        ("START", errno.ENOMEM),
        ("GET_BITMAP", errno.EFAULT),
        ("GET_BITMAP", errno.ENOMEM),
    ],
)
def test_a_start_that_fails_half_way_is_undone(
    container: FakeContainer, call: str, error: int
) -> None:
    container.errors = [(call, error)]
    source = VfioType1(container.fd, [BLOCK], SEEN)
    with pytest.raises(SourceError, match=os.strerror(error)):
        source.start()
    assert not container.tracking
    assert not is_open(container.fd)
    assert ("STOP" in container.calls[-1]) is (call == "GET_BITMAP")
    with pytest.raises(SourceError, match="was not started"):
        source.collect()


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [errno.EINVAL, errno.EFAULT])
def test_a_reading_that_fails_half_way_is_no_reading(
    container: FakeContainer, failing: int, error: int
) -> None:
    """The first of two, or the second, after the first has consumed its bits."""
    source = VfioType1(container.fd, [BLOCK], SEEN)
    source.start()
    container.errors = [("GET_BITMAP", 0)] * failing + [("GET_BITMAP", error)]
    with pytest.raises(SourceError):
        source.collect()
    source.stop()


def test_a_container_without_dirty_tracking(
    container: FakeContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Type1Info(PAGE, 0, 0, (), -1)
    monkeypatch.setattr(vfio, "iommu_info", lambda fd: nothing)
    with pytest.raises(SourceError, match="no dirty tracking"):
        VfioType1(container.fd, [BLOCK], SEEN).start()
    assert container.calls == []


def test_a_guest_map_that_is_of_another_guest(container: FakeContainer) -> None:
    with pytest.raises(SourceError, match="sees nothing of it"):
        VfioType1(container.fd, [BLOCK], []).start()
    assert not container.tracking
    assert not is_open(container.fd)


def test_what_is_no_container() -> None:
    """With the real ioctl."""
    fd = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(OSError, match="VFIO_IOMMU_GET_INFO") as caught:
        iommu_info(fd)
    assert caught.value.errno == errno.ENOTTY
    with pytest.raises(SourceError, match="VFIO_IOMMU_GET_INFO"):
        VfioType1(fd, [BLOCK], SEEN).start()
    assert not is_open(fd)
