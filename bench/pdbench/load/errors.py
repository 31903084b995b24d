"""The exception for a load that cannot be built from what the user wrote."""

from __future__ import annotations


class LoadError(ValueError):
    """The message says what is wrong and what would be right; it is shown as it is."""
