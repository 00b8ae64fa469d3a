"""Two hosts on one machine: two network namespaces, and commands that run in them."""
