"""What keeps a run safe: checkpoints, its directory, logs, guards, signals."""
