"""Studies: a grid of runs in one YAML, run by any number of processes, and the tables that come of it."""
