"""Sweeps, ablations and scaling laws: many runs of one experiment, and what can be said from them."""
