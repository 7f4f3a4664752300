"""Data sets: where the images are, their splits and labels, and the pipelines over them."""
