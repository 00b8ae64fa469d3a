"""One guest that is moved, by this program or by QEMU itself, and what its user notices."""
