"""`pdbench selfcheck`: how far can the load generator be trusted, on this machine and at this load?"""
