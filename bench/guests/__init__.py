"""Guests to measure with, and the patterns in which they write."""
