"""The built-in workload guest, from its assembler to its boot sector."""
