"""Results as one HTML file with pictures: no scripts, and nothing that is not in the file."""
