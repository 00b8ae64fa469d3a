"""Which pages of another process's memory were written since they were last looked at.

The path of a dirty bit, in the order of the modules:

- :mod:`tracker.abi`      what the kernel's headers say, without a single call
- :mod:`tracker.syscalls` the calls that the standard library lacks
- :mod:`tracker.inject.acquire`   a userfaultfd of another process: :mod:`tracker.inject.injector`
  is the short-lived process that gets it, :mod:`tracker.inject.tracee` one stopped thread,
  :mod:`tracker.inject.registers` how a call is made in it, :mod:`tracker.inject.refusal` why it may
  not be
- :mod:`tracker.memory.ram`      the RAM blocks of a QEMU process
- :mod:`tracker.bits.bitmap`   one bit a page
- :mod:`tracker.bits.words`  the compiled loops over pages and words; :mod:`tracker.bits.native`
  what they call of libc
- :mod:`tracker.memory.extents`  which pages of a block hold data
- :mod:`tracker.sources.source`   what a dirty source has to promise
- :mod:`tracker.sources.uffd`, :mod:`tracker.sources.holes`  the sources of what the CPU wrote and
  QEMU discarded
- :mod:`tracker.devices.vfio`, :mod:`tracker.devices.iommufd`, :mod:`tracker.devices.devicelog`  the
  sources of what devices wrote: :mod:`tracker.devices.dma` chooses among them,
  :mod:`tracker.devices.descriptors` gets at what they read, :mod:`tracker.devices.ioas` is what an
  iommufd holds, :mod:`tracker.devices.iova` brings a device's addresses to the blocks
- :mod:`tracker.sources.softdirty`  a source for kernels without asynchronous write-protection:
  :mod:`tracker.sources.pagemap` reads the bits, :mod:`tracker.inject.frozen` has the process stand
  still meanwhile (:mod:`tracker.inject.freezer` is who stops it)
- :mod:`tracker.answered.uffdsync`  another one: each first write waits for
  :mod:`tracker.answered.faultserver`, whose loops are :mod:`tracker.answered.faults`
- :mod:`tracker.sources.contenthash`  a source that needs nothing of the kernel:
  :mod:`tracker.memory.copies` knows the digests (:mod:`tracker.memory.pagehash`,
  :mod:`tracker.memory.xxh64`) of what was copied; :mod:`tracker.sources.coarse` has it look at what
  another source reports
- :mod:`tracker.bits.merge`    several sources become one bitmap a block

Beside it: :mod:`tracker.probe.probe` tries whether the kernel does what all of this relies on, on a
process of its own (:mod:`tracker.probe.subject`) with the same calls (:mod:`tracker.probe.trial`).
:mod:`tracker.pins.pins` tries what pinned pages and write-protection owe each other
(:mod:`tracker.pins.matrix` all of it): :mod:`tracker.pins.pinned` holds on to pages, by way of
:mod:`tracker.pins.iouring` and :mod:`tracker.pins.heldfile`, and :mod:`tracker.pins.watchers` look
on.
"""
