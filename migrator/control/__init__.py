"""Asking a migration that is under way: the socket it listens at, and its clients."""
