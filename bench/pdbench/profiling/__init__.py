"""`pdbench profile` and `pdbench traces`: a role's forward steps under a load, one after the other, as the profiler saw them."""
