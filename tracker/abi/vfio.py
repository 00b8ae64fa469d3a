"""Devices and their address space, given to a process: ``include/uapi/linux/vfio.h``.

Three kinds of descriptor: a *container* (``/dev/vfio/vfio``) has the legacy type 1 IOMMU, a *group*
is what was put into it, a *device* is what is used. Since Linux 6.6 a device can be opened by its
own character device and bound to an iommufd (:mod:`tracker.abi.iommufd`) instead.

Structures end where C has a flexible array: what follows is put behind them.
"""

from __future__ import annotations

import ctypes

from tracker.abi.ioctl import io

VFIO_TYPE = ord(";")
VFIO_BASE = 100

# --- a container with a type 1 IOMMU --------------------------------------------------------------

VFIO_TYPE1v2_IOMMU = 3

VFIO_IOMMU_INFO_PGSIZES = 1 << 0
VFIO_IOMMU_INFO_CAPS = 1 << 1

VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1
VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2  # in v5.8: there is dirty page logging
VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3

VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1 << 0
VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 1 << 1
VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 1 << 2


class vfio_info_cap_header(ctypes.Structure):
    """Beginning of a capability; ``next`` is a byte offset from the start of the info, or 0."""

    _fields_ = (
        ("id", ctypes.c_uint16),
        ("version", ctypes.c_uint16),
        ("next", ctypes.c_uint32),
    )


class vfio_iommu_type1_info(ctypes.Structure):
    """Argument of VFIO_IOMMU_GET_INFO; ``iova_pgsizes`` has a bit set for each size in bytes.

    Where ``argsz`` is too small for the capabilities, ``cap_offset`` is 0 and ``argsz`` the size
    needed. Older headers end with ``cap_offset``; both are 24 bytes.
    """

    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("iova_pgsizes", ctypes.c_uint64),
        ("cap_offset", ctypes.c_uint32),
    )


class vfio_iova_range(ctypes.Structure):
    """Addresses that may be mapped, ``end`` inclusive."""

    _fields_ = (
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
    )


class vfio_iommu_type1_info_cap_iova_range(ctypes.Structure):
    """Capability: followed by ``nr_iovas`` times :class:`vfio_iova_range`."""

    _fields_ = (
        ("header", vfio_info_cap_header),
        ("nr_iovas", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


class vfio_iommu_type1_info_cap_migration(ctypes.Structure):
    """Capability: ``pgsize_bitmap`` has a bit set for each size, the last one is in bytes."""

    _fields_ = (
        ("header", vfio_info_cap_header),
        ("flags", ctypes.c_uint32),
        ("pgsize_bitmap", ctypes.c_uint64),
        ("max_dirty_bitmap_size", ctypes.c_uint64),
    )


class vfio_iommu_type1_info_dma_avail(ctypes.Structure):
    """Capability: how many more mappings there may be."""

    _fields_ = (
        ("header", vfio_info_cap_header),
        ("avail", ctypes.c_uint32),
    )


class vfio_bitmap(ctypes.Structure):
    """One bit a page of ``pgsize`` bytes; ``size`` in bytes, ``data`` an address of ours."""

    _fields_ = (
        ("pgsize", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("data", ctypes.c_uint64),
    )


class vfio_iommu_type1_dirty_bitmap(ctypes.Structure):
    """Argument of VFIO_IOMMU_DIRTY_PAGES: one flag, and for GET_BITMAP what follows."""

    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class vfio_iommu_type1_dirty_bitmap_get(ctypes.Structure):
    """The rest of the argument for GET_BITMAP: IOVA and size in bytes."""

    _fields_ = (
        ("iova", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("bitmap", vfio_bitmap),
    )


class vfio_iommu_type1_get_bitmap(ctypes.Structure):
    """The whole argument for GET_BITMAP: C has no name for it."""

    _fields_ = (
        ("head", vfio_iommu_type1_dirty_bitmap),
        ("get", vfio_iommu_type1_dirty_bitmap_get),
    )


VFIO_IOMMU_GET_INFO = io(VFIO_TYPE, VFIO_BASE + 12)
VFIO_IOMMU_DIRTY_PAGES = io(VFIO_TYPE, VFIO_BASE + 17)

# --- a device -------------------------------------------------------------------------------------

VFIO_DEVICE_FEATURE_GET = 1 << 16
VFIO_DEVICE_FEATURE_SET = 1 << 17
VFIO_DEVICE_FEATURE_PROBE = 1 << 18

# In v6.1.
VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6
VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7
VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8


class vfio_device_feature(ctypes.Structure):
    """Argument of VFIO_DEVICE_FEATURE: ``flags`` is a feature and what to do; data follow."""

    _fields_ = (
        ("argsz", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class vfio_device_feature_dma_logging_control(ctypes.Structure):
    """Data of LOGGING_START: ``ranges`` is the address of an array of the structure below.

    ``page_size`` is a wish in bytes, answered with what it became.
    """

    _fields_ = (
        ("page_size", ctypes.c_uint64),
        ("num_ranges", ctypes.c_uint32),
        ("__reserved", ctypes.c_uint32),
        ("ranges", ctypes.c_uint64),
    )


class vfio_device_feature_dma_logging_range(ctypes.Structure):
    """A range to log, in bytes."""

    _fields_ = (
        ("iova", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
    )


class vfio_device_feature_dma_logging_report(ctypes.Structure):
    """Data of LOGGING_REPORT, in bytes; ``bitmap`` is an address of ours."""

    _fields_ = (
        ("iova", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("page_size", ctypes.c_uint64),
        ("bitmap", ctypes.c_uint64),
    )


VFIO_DEVICE_FEATURE = io(VFIO_TYPE, VFIO_BASE + 17)
