"""Is this host able to migrate, and if not, what mends it."""
