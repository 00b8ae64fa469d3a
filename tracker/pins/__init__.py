"""Pages that are pinned, tried on this kernel: what is seen of writes through a pin."""
