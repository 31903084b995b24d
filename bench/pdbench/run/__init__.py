"""`pdbench run`: load an endpoint, record every request, summarise."""
