"""Sweeps: many benchmark runs over deployments and loads, from one file, in the order that restarts least (docs/sweeps.md)."""
