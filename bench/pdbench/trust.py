"""Whom clients trust over https."""

from __future__ import annotations

import ssl


def trusting(ca: str) -> ssl.SSLContext:
    """Return a context that trusts these certificates (PEM) and no others; "": the system's. Raises ValueError or OSError."""
    return ssl.create_default_context(cadata=ca or None)
