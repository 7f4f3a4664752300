"""The runtime of a run: checkpoints, directory, logs, guards, signals."""
