"""The `compare` verb: do two configurations differ, by how much, and how many runs would it take to see."""
