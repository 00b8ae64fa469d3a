"""Strategies of dirty tracking on programs that write in known patterns."""
