"""Studies: sweeps, ablations and scaling laws, with statistics that a reviewer would accept."""
