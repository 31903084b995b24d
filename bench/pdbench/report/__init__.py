"""`pdbench report`: plots and one page from the folder of a run."""
