"""Data sets: images, splits and labels, and the pipelines over them."""
