"""`pdbench advise`: which ratio, by simulation of the emulator's model in virtual time; and how wrong that is (`--check`)."""
