"""The IOMMU behind a descriptor: ``include/uapi/linux/iommufd.h`` (in v6.2).

An iommufd holds objects that are named by small numbers: devices, IO address spaces (IOAS: what
memory is mapped where) and hardware page tables (HWPT: an IOAS as an IOMMU walks it). Each argument
begins with its own size in bytes.
"""

from __future__ import annotations

import ctypes

from tracker.abi.ioctl import io

IOMMUFD_TYPE = ord(";")

IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0
IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
IOMMU_IOAS_MAP_READABLE = 1 << 2

IOMMU_HWPT_DIRTY_TRACKING_ENABLE = 1  # in v6.7
IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1  # in v6.7
IOMMU_HW_CAP_DIRTY_TRACKING = 1 << 0


class iommu_destroy(ctypes.Structure):
    """Argument of IOMMU_DESTROY: any object."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
    )


class iommu_ioas_alloc(ctypes.Structure):
    """Argument of IOMMU_IOAS_ALLOC."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("out_ioas_id", ctypes.c_uint32),
    )


class iommu_ioas_iova_ranges(ctypes.Structure):
    """Argument of IOMMU_IOAS_IOVA_RANGES: ``num_iovas`` is how many there is room for."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("ioas_id", ctypes.c_uint32),
        ("num_iovas", ctypes.c_uint32),
        ("__reserved", ctypes.c_uint32),
        ("allowed_iovas", ctypes.c_uint64),
        ("out_iova_alignment", ctypes.c_uint64),
    )


class iommu_ioas_copy(ctypes.Structure):
    """Argument of IOMMU_IOAS_COPY, in bytes; without FIXED_IOVA, ``dst_iova`` is an answer."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("dst_ioas_id", ctypes.c_uint32),
        ("src_ioas_id", ctypes.c_uint32),
        ("length", ctypes.c_uint64),
        ("dst_iova", ctypes.c_uint64),
        ("src_iova", ctypes.c_uint64),
    )


class iommu_hw_info(ctypes.Structure):
    """Argument of IOMMU_GET_HW_INFO (in v6.6; ``out_capabilities`` in v6.7).

    ``out_max_pasid_log2`` was one of four reserved bytes before v6.15.
    """

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("dev_id", ctypes.c_uint32),
        ("data_len", ctypes.c_uint32),
        ("data_uptr", ctypes.c_uint64),
        ("out_data_type", ctypes.c_uint32),
        ("out_max_pasid_log2", ctypes.c_uint8),
        ("__reserved", ctypes.c_uint8 * 3),
        ("out_capabilities", ctypes.c_uint64),
    )


class iommu_hwpt_set_dirty_tracking(ctypes.Structure):
    """Argument of IOMMU_HWPT_SET_DIRTY_TRACKING."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("hwpt_id", ctypes.c_uint32),
        ("__reserved", ctypes.c_uint32),
    )


class iommu_hwpt_get_dirty_bitmap(ctypes.Structure):
    """Argument of IOMMU_HWPT_GET_DIRTY_BITMAP, in bytes; ``data`` is an address of ours.

    Bit 0 is the page at ``iova``, whatever the formula in the header says.
    """

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("hwpt_id", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("__reserved", ctypes.c_uint32),
        ("iova", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("page_size", ctypes.c_uint64),
        ("data", ctypes.c_uint64),
    )


IOMMU_DESTROY = io(IOMMUFD_TYPE, 0x80)
IOMMU_IOAS_ALLOC = io(IOMMUFD_TYPE, 0x81)
IOMMU_IOAS_COPY = io(IOMMUFD_TYPE, 0x83)
IOMMU_IOAS_IOVA_RANGES = io(IOMMUFD_TYPE, 0x84)
IOMMU_GET_HW_INFO = io(IOMMUFD_TYPE, 0x8A)
IOMMU_HWPT_SET_DIRTY_TRACKING = io(IOMMUFD_TYPE, 0x8B)
IOMMU_HWPT_GET_DIRTY_BITMAP = io(IOMMUFD_TYPE, 0x8C)
