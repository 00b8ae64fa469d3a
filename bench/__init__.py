"""Measurements: what the migrator costs, beside the cheapest that could be, and beside QEMU."""
