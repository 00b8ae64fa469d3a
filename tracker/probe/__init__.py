"""Does this kernel track writes as it has to? Tried on memory of another process."""
