"""QEMU itself: its monitor, its process, its settings, its device state."""
