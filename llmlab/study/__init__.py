"""Studies: sweeps, ablations and scaling laws over runs, with statistics."""
