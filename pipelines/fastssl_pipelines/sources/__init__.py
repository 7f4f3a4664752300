"""Image files: found, read, decoded, checked and converted."""
