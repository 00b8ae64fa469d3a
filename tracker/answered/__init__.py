"""Writes that wait for an answer of a process of ours, and writers that are slowed by it."""
