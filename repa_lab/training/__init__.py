"""Training one run: the loop, its randomness, its checkpoints, sampling and measurements."""
