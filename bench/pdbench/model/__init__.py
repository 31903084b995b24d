"""The performance model: how long prefill, decode and KV transfer take, and what a scheduler does with them.

Pure: no clock, no I/O, no randomness. `pdbench emulate` runs it against the wall clock, `pdbench.model.cluster` in virtual
time. docs/emulator.md explains the formulas and where each figure comes from.
"""
