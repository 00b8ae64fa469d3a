"""What the compiled loops take, beside numpy and the memory's own speed."""
