"""This program beside QEMU's own migration, and the targets for that."""
