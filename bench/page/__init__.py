"""Results as one HTML file with pictures."""
