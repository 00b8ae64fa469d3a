"""All dirty sources of a running VM, read together."""
