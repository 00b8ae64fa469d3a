"""The way to another host: keys, TLS, connections, messages and sessions."""
