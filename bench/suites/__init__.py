"""The cases of the benchmark, a file for each kind."""
