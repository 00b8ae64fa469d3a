"""RAM blocks of a process, and what is in their pages."""
