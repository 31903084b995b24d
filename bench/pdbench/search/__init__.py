"""`pdbench search`: the load at which something stops to hold, found by measuring."""
