"""Sweeps: many cells measured in turn, and the one table made of their runs."""
