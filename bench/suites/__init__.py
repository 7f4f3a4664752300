"""The cases that are measured, a file for each kind."""
