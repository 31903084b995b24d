"""Bad input at scale: what users hand in, spoiled; each surface is a function that draws an input and checks the law."""

from __future__ import annotations

from fuzz import files, folders, planning, wires

#: what `make test` tries a little of
QUICK = {**planning.SURFACES, **files.SURFACES, **wires.SURFACES, **folders.SURFACES}
SURFACES = {**QUICK, **folders.SLOW}
