"""The exception for a load that cannot be built from what the user wrote."""

from __future__ import annotations

from pdbench.reading import brief


class LoadError(ValueError):
    """The message says what is wrong and what would be right; it is shown as it is, but for words without end."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(str(message)))
