"""Which pages of another process's memory were written since they were last looked at.

The path of a dirty bit, in the order of the modules:

- :mod:`tracker.abi`      what the kernel's headers say, without a single call
- :mod:`tracker.syscalls` the calls that the standard library lacks
- :mod:`tracker.inject`   a userfaultfd of another process: :mod:`tracker.injector` is the
  short-lived process that gets it, :mod:`tracker.tracee` one stopped thread,
  :mod:`tracker.registers` how a call is made in it, :mod:`tracker.refusal` why it may not be
- :mod:`tracker.ram`      the RAM blocks of a QEMU process
- :mod:`tracker.bitmap`   one bit a page
- :mod:`tracker.kernels`  the compiled loops over pages and words; :mod:`tracker.native` what they
  call of libc
- :mod:`tracker.extents`  which pages of a block hold data
- :mod:`tracker.source`   what a dirty source has to promise
- :mod:`tracker.uffd`, :mod:`tracker.holes`  the sources of what the CPU wrote and QEMU discarded
- :mod:`tracker.vfio`, :mod:`tracker.iommufd`, :mod:`tracker.devicelog`  the sources of what devices
  wrote: :mod:`tracker.dma` chooses among them, :mod:`tracker.descriptors` gets at what they read,
  :mod:`tracker.ioas` is what an iommufd holds, :mod:`tracker.iova` brings a device's addresses to
  the blocks
- :mod:`tracker.softdirty`  a source for kernels without asynchronous write-protection:
  :mod:`tracker.pagemap` reads the bits, :mod:`tracker.frozen` has the process stand still meanwhile
  (:mod:`tracker.freezer` is who stops it)
- :mod:`tracker.uffdsync`  another one: each first write waits for :mod:`tracker.faultserver`, whose
  loops are :mod:`tracker.faults`
- :mod:`tracker.contenthash`  a source that needs nothing of the kernel: :mod:`tracker.copies` knows
  the digests (:mod:`tracker.pagehash`, :mod:`tracker.xxh64`) of what was copied;
  :mod:`tracker.coarse` has it look at what another source reports
- :mod:`tracker.merge`    several sources become one bitmap a block

Beside it: :mod:`tracker.probe` tries whether the kernel does what all of this relies on, on a
process of its own (:mod:`tracker.subject`) with the same calls (:mod:`tracker.trial`).
:mod:`tracker.pins` tries what pinned pages and write-protection owe each other
(:mod:`tracker.matrix` all of it): :mod:`tracker.pinned` holds on to pages, by way of
:mod:`tracker.iouring` and :mod:`tracker.fuse`, and :mod:`tracker.watchers` look on.
"""
