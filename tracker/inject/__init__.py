"""A call in another process, and threads of another process that are stopped or held."""
