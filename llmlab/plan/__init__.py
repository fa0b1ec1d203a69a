"""What an experiment costs, found out without running it."""
