"""The transport between two hosts alone: what a stream carries."""
