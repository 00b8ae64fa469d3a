"""Dirty sources: what they promise, and those of what the CPU wrote and QEMU discarded."""
