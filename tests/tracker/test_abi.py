"""Every number and offset of tracker.abi, compared with what a C compiler makes of the headers."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import require
from tracker.abi import (
    fuse,
    inotify,
    io_uring,
    ioctl,
    iommufd,
    mount,
    pagemap,
    ptrace,
    rseq,
    uio,
    unistd,
    userfaultfd,
    vfio,
)

# What Debian 12's headers (Linux 6.1) do not have yet, as the headers that do have it say. With
# newer headers the compiler is asked instead.
NEWER_CONSTANTS = {
    # include/uapi/linux/userfaultfd.h, v6.8
    "UFFD_FEATURE_WP_UNPOPULATED": 0x2000,
    "UFFD_FEATURE_POISON": 0x4000,
    "UFFD_FEATURE_WP_ASYNC": 0x8000,
    "UFFD_FEATURE_MOVE": 0x10000,
    # include/uapi/linux/fs.h, v6.7
    "PAGEMAP_SCAN": (1 | 2) << 30 | 12 * 8 << 16 | ord("f") << 8 | 16,
    "PAGE_IS_WPALLOWED": 0x01,
    "PAGE_IS_WRITTEN": 0x02,
    "PAGE_IS_FILE": 0x04,
    "PAGE_IS_PRESENT": 0x08,
    "PAGE_IS_SWAPPED": 0x10,
    "PAGE_IS_PFNZERO": 0x20,
    "PAGE_IS_HUGE": 0x40,
    "PAGE_IS_SOFT_DIRTY": 0x80,
    "PM_SCAN_WP_MATCHING": 0x1,
    "PM_SCAN_CHECK_WPASYNC": 0x2,
    # include/uapi/linux/iommufd.h, v6.7
    "IOMMUFD_TYPE": ord(";"),
    "IOMMU_DESTROY": ord(";") << 8 | 0x80,
    "IOMMU_IOAS_ALLOC": ord(";") << 8 | 0x81,
    "IOMMU_IOAS_COPY": ord(";") << 8 | 0x83,
    "IOMMU_IOAS_IOVA_RANGES": ord(";") << 8 | 0x84,
    "IOMMU_GET_HW_INFO": ord(";") << 8 | 0x8A,
    "IOMMU_HWPT_SET_DIRTY_TRACKING": ord(";") << 8 | 0x8B,
    "IOMMU_HWPT_GET_DIRTY_BITMAP": ord(";") << 8 | 0x8C,
    "IOMMU_IOAS_MAP_FIXED_IOVA": 0x1,
    "IOMMU_IOAS_MAP_WRITEABLE": 0x2,
    "IOMMU_IOAS_MAP_READABLE": 0x4,
    "IOMMU_HWPT_DIRTY_TRACKING_ENABLE": 0x1,
    "IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR": 0x1,
    "IOMMU_HW_CAP_DIRTY_TRACKING": 0x1,
    # fs/proc/task_mmu.c: in no header, as documented in admin-guide/mm/pagemap.rst
    "PM_SOFT_DIRTY": 0x80000000000000,
    "PM_UFFD_WP": 0x200000000000000,
    "PM_SWAP": 0x4000000000000000,
    "PM_PRESENT": 0x8000000000000000,
    "CLEAR_REFS_SOFT_DIRTY": 4,
}

# Members of an enum, which the preprocessor does not know, and a macro of the same header.
ENUMERATED = {
    "KCMP_FILE": "_LINUX_KCMP_H",
    "IOMMU_IOAS_MAP_FIXED_IOVA": "IOMMU_HWPT_GET_DIRTY_BITMAP",
    "IOMMU_IOAS_MAP_WRITEABLE": "IOMMU_HWPT_GET_DIRTY_BITMAP",
    "IOMMU_IOAS_MAP_READABLE": "IOMMU_HWPT_GET_DIRTY_BITMAP",
    "IOMMU_HWPT_DIRTY_TRACKING_ENABLE": "IOMMU_HWPT_GET_DIRTY_BITMAP",
    "IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR": "IOMMU_HWPT_GET_DIRTY_BITMAP",
    "IOMMU_HW_CAP_DIRTY_TRACKING": "IOMMU_HWPT_GET_DIRTY_BITMAP",
}

INCLUDES = """
#include <stddef.h>
#include <stdio.h>
#include <linux/elf.h>
#include <linux/fs.h>
#if __has_include(<linux/iommufd.h>)
#include <linux/iommufd.h>
#endif
#include <linux/kcmp.h>
#include <linux/fuse.h>
#include <linux/io_uring.h>
#include <linux/mount.h>
#include <sys/inotify.h>
#include <linux/ptrace.h>
#include <linux/rseq.h>
#include <linux/uio.h>
#include <linux/userfaultfd.h>
#include <linux/vfio.h>
#include <sys/syscall.h>
#include <sys/user.h>
"""

# Structures that the system's headers may lack, or that are another architecture's.
OWN_STRUCTURES = """
#ifndef PAGEMAP_SCAN /* include/uapi/linux/fs.h, v6.7 */
struct page_region { __u64 start, end, categories; };
struct pm_scan_arg {
    __u64 size, flags, start, end, walk_end, vec, vec_len, max_pages;
    __u64 category_inverted, category_mask, category_anyof_mask, return_mask;
};
#endif
#ifndef IOMMU_HWPT_GET_DIRTY_BITMAP /* include/uapi/linux/iommufd.h, v6.7 */
struct iommu_destroy { __u32 size, id; };
struct iommu_ioas_alloc { __u32 size, flags, out_ioas_id; };
struct iommu_ioas_iova_ranges {
    __u32 size, ioas_id, num_iovas, __reserved;
    __aligned_u64 allowed_iovas, out_iova_alignment;
};
struct iommu_ioas_copy {
    __u32 size, flags, dst_ioas_id, src_ioas_id;
    __aligned_u64 length, dst_iova, src_iova;
};
struct iommu_hw_info {
    __u32 size, flags, dev_id, data_len;
    __aligned_u64 data_uptr;
    __u32 out_data_type;
    __u8 out_max_pasid_log2, __reserved[3];
    __aligned_u64 out_capabilities;
};
struct iommu_hwpt_set_dirty_tracking { __u32 size, flags, hwpt_id, __reserved; };
struct iommu_hwpt_get_dirty_bitmap {
    __u32 size, hwpt_id, flags, __reserved;
    __aligned_u64 iova, length, page_size, data;
};
#endif
struct vfio_iommu_type1_get_bitmap { /* the argument with what it ends in */
    struct vfio_iommu_type1_dirty_bitmap head;
    struct vfio_iommu_type1_dirty_bitmap_get get;
};
/* arch/arm64/include/uapi/asm/ptrace.h */
struct user_pt_regs { __u64 regs[31]; __u64 sp; __u64 pc; __u64 pstate; };
"""


def _constants(module: ModuleType, prefixes: tuple[str, ...]) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if name.startswith(prefixes)}


CONSTANTS = {
    **_constants(userfaultfd, ("UFFD", "USERFAULTFD")),
    **_constants(pagemap, ("PAGE", "PM_", "CLEAR_")),
    **_constants(inotify, ("IN_",)),
    **_constants(ptrace, ("PTRACE_", "NT_")),
    **_constants(vfio, ("VFIO_",)),
    **_constants(iommufd, ("IOMMU_", "IOMMUFD_")),
    "KCMP_FILE": unistd.KCMP_FILE,
    **_constants(io_uring, ("IORING_",)),
    **_constants(fuse, ("FUSE_", "FOPEN_")),
    **_constants(mount, ("FS",)),
    **{f"PTRACE_{request.name}": int(request) for request in ptrace.Request},
}

# Enumerators in C: no macros, which could be asked for with #ifdef.
ENUMERATORS = {
    name
    for name in CONSTANTS
    if name.startswith(("IORING_OP_", "IORING_REGISTER_", "IORING_UNREGISTER_", "FSCONFIG_"))
    or (name.startswith("FUSE_") and name not in ("FUSE_KERNEL_VERSION", "FUSE_MIN_READ_BUFFER"))
}

STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    userfaultfd.uffdio_api,
    userfaultfd.uffdio_range,
    userfaultfd.uffdio_register,
    userfaultfd.uffdio_writeprotect,
    userfaultfd.uffd_msg,
    pagemap.page_region,
    pagemap.pm_scan_arg,
    ptrace.ptrace_rseq_configuration,
    ptrace.user_regs_struct,
    ptrace.user_pt_regs,
    rseq.rseq,
    rseq.rseq_cs,
    uio.iovec,
    vfio.vfio_info_cap_header,
    vfio.vfio_iommu_type1_info,
    vfio.vfio_iova_range,
    vfio.vfio_iommu_type1_info_cap_iova_range,
    vfio.vfio_iommu_type1_info_cap_migration,
    vfio.vfio_iommu_type1_info_dma_avail,
    vfio.vfio_bitmap,
    vfio.vfio_iommu_type1_dirty_bitmap,
    vfio.vfio_iommu_type1_dirty_bitmap_get,
    vfio.vfio_iommu_type1_get_bitmap,
    vfio.vfio_device_feature,
    vfio.vfio_device_feature_dma_logging_control,
    vfio.vfio_device_feature_dma_logging_range,
    vfio.vfio_device_feature_dma_logging_report,
    iommufd.iommu_destroy,
    iommufd.iommu_ioas_alloc,
    iommufd.iommu_ioas_iova_ranges,
    iommufd.iommu_ioas_copy,
    iommufd.iommu_hw_info,
    iommufd.iommu_hwpt_set_dirty_tracking,
    iommufd.iommu_hwpt_get_dirty_bitmap,
    io_uring.io_uring_sqe,
    io_uring.io_uring_cqe,
    io_uring.io_sqring_offsets,
    io_uring.io_cqring_offsets,
    io_uring.io_uring_params,
    fuse.fuse_in_header,
    fuse.fuse_out_header,
    fuse.fuse_init_out,
    fuse.fuse_attr,
    fuse.fuse_attr_out,
    fuse.fuse_open_out,
    fuse.fuse_read_in,
    fuse.fuse_write_in,
    fuse.fuse_write_out,
)

# Where C has more than one name on the way to a field.
C_PATHS = {
    "uffd_msg.pagefault": "arg.pagefault",
}
# Only the beginning of these is described; the rest has grown over the years.
OPEN_ENDED = {rseq.rseq}


def _fields(structure: type[ctypes.Structure]) -> list[str]:
    """All but those that are kept free, which newer headers put to use under another name."""
    names = [field[0] for field in structure._fields_]
    return [name for name in names if not name.startswith(("resv", "padding", "unused"))]


def _output_of(program: str, directory: Path) -> dict[str, int]:
    source, binary = directory / "probe.c", directory / "probe"
    source.write_text(program)
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", binary, source], check=True)
    lines = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    return {name: int(value, 0) for name, value in map(str.split, lines.splitlines())}


@pytest.fixture(scope="module")
def c(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What C says: constants by name, ``sizeof STRUCT``, ``STRUCT.FIELD`` as offset:size."""
    require(None if shutil.which("gcc") else "no gcc")
    require(None if os.uname().machine == "x86_64" else "the probe needs x86-64 headers")
    body = []
    for name in CONSTANTS:
        said = f'printf("{name} %#llx\\n", (unsigned long long){name});'
        condition = ENUMERATED.get(name, name)
        body.append(said if name in ENUMERATORS else f"#ifdef {condition}\n{said}\n#endif")
    for structure in STRUCTURES:
        tag = structure.__name__
        body.append(f'printf("{tag} %zu\\n", sizeof(struct {tag}));')
        for field in _fields(structure):
            path = C_PATHS.get(f"{tag}.{field}", field)
            offset, size = f"offsetof(struct {tag}, {path})", f"sizeof(((struct {tag} *)0)->{path})"
            body.append(f'printf("{tag}.{field}@ %zu\\n{tag}.{field}# %zu\\n", {offset}, {size});')
    # The anonymous structure inside the union of uffd_msg, seen from the message.
    for field, path in (("flags", "flags"), ("address", "address"), ("ptid", "feat.ptid")):
        offset = f"offsetof(struct uffd_msg, arg.pagefault.{path})"
        body.append(f'printf("pagefault.{field}@ %zu\\n", {offset});')
    numbers = ", ".join(f"__NR_{name}" for name in unistd.Numbers._fields)
    body.append(f"int numbers[] = {{{numbers}}};")
    for i, name in enumerate(unistd.Numbers._fields):
        body.append(f'printf("__NR_{name} %d\\n", numbers[{i}]);')
    main = "int main(void) {\n" + "\n".join(body) + "\nreturn 0;\n}\n"
    return _output_of(INCLUDES + OWN_STRUCTURES + main, tmp_path_factory.mktemp("abi"))


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant(c: dict[str, int], name: str) -> None:
    if name in c:
        assert CONSTANTS[name] == c[name]
    else:
        assert CONSTANTS[name] == NEWER_CONSTANTS[name]


def test_newer_constants_are_ours() -> None:
    assert NEWER_CONSTANTS.keys() <= CONSTANTS.keys()


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.__name__)
def test_structure(c: dict[str, int], structure: type[ctypes.Structure]) -> None:
    tag = structure.__name__
    ours, theirs = {}, {}
    for field in _fields(structure):
        if (structure, field) == (userfaultfd.uffd_msg, "pagefault"):
            descriptor = structure.pagefault
            assert descriptor.offset == c[f"{tag}.pagefault@"]
            continue
        descriptor = getattr(structure, field)
        ours[field] = (descriptor.offset, descriptor.size)
        theirs[field] = (c[f"{tag}.{field}@"], c[f"{tag}.{field}#"])
    assert ours == theirs
    if structure in OPEN_ENDED:
        assert ctypes.sizeof(structure) <= c[tag]
    else:
        assert ctypes.sizeof(structure) == c[tag]


@pytest.mark.parametrize("field", ["flags", "address", "ptid"])
def test_pagefault_message(c: dict[str, int], field: str) -> None:
    inner = getattr(userfaultfd.uffd_msg_pagefault, field).offset
    assert userfaultfd.uffd_msg.pagefault.offset + inner == c[f"pagefault.{field}@"]


@pytest.mark.parametrize("name", unistd.Numbers._fields)
def test_call_number_x86_64(c: dict[str, int], name: str) -> None:
    assert getattr(unistd.X86_64, name) == c[f"__NR_{name}"]


def test_call_numbers_aarch64(tmp_path: Path) -> None:
    """The architecture uses asm-generic/unistd.h, which is installed everywhere."""
    require(None if shutil.which("gcc") else "no gcc")
    prints = "".join(f'printf("{n} %d\\n", __NR_{n});' for n in unistd.Numbers._fields)
    program = f"#include <stdio.h>\n#include <asm-generic/unistd.h>\nint main(void) {{{prints}}}"
    assert _output_of(program, tmp_path) == unistd.AARCH64._asdict()


@pytest.mark.parametrize(
    ("macro", "ours"),
    [
        ("_IO('a', 255)", ioctl.io(ord("a"), 255)),
        ("_IOR('b', 1, struct user_regs_struct)", ioctl.ior(ord("b"), 1, ptrace.user_regs_struct)),
        ("_IOW(0xFF, 0, struct iovec)", ioctl.iow(0xFF, 0, uio.iovec)),
        ("_IOWR(0, 7, struct rseq_cs)", ioctl.iowr(0, 7, rseq.rseq_cs)),
        ("_IOC(_IOC_READ, 0, 0, 0x3FFF)", ioctl.ioc(2, 0, 0, 0x3FFF)),
    ],
)
def test_ioctl_formula(tmp_path: Path, macro: str, ours: int) -> None:
    require(None if shutil.which("gcc") else "no gcc")
    main = f'int main(void) {{ printf("x %#x\\n", (unsigned){macro}); }}'
    assert _output_of(INCLUDES + "#include <linux/ioctl.h>\n" + main, tmp_path)["x"] == ours


@pytest.mark.parametrize(
    "parts", [(4, 0, 0, 0), (0, 256, 0, 0), (0, 0, 256, 0), (0, 0, 0, 1 << 14)]
)
def test_ioctl_part_too_large(parts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        ioctl.ioc(*parts)
