"""Decisions of a migration, as pure functions and objects without input or output."""
