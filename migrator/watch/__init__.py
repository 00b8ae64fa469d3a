"""The tracking alone: a VM that is watched, or recorded."""
