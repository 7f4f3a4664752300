"""Pipelines: what decodes the images of a batch and renders their views."""
