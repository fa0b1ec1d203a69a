"""State, step, the visible loop, checkpoints, metrics and fault handling."""
