"""`pdbench fit`: the performance model's figures, fitted to measured runs; what is said of runs that were not used for it."""
