"""Which pages: bitmaps, their union and history, and the compiled loops over them."""
