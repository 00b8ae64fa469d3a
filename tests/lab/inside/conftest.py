"""What tests in the lab VM may use: its devices, and the QEMU that runs in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.lab.inside.devices import Device, bound_to_vfio, find_edu, mtty
from tests.live.qemus import QEMUS


@pytest.fixture
def edu() -> Iterator[Device]:
    """QEMU's edu device, bound to vfio-pci for this test."""
    with bound_to_vfio(find_edu()) as device:
        yield device


@pytest.fixture
def make_mtty() -> Iterator[Callable[[], Device]]:
    """Makes an mtty mdev each time; they are removed after the test, the last one first."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(mtty())


@pytest.fixture
def inner_qemu() -> tuple[str, ...]:
    """The command of the newest QEMU here, 10 or later; arguments go after it."""
    return QEMUS[-1].require()
