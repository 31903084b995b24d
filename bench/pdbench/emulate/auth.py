"""Who may call what: the rules of SGLang 0.5.23's `srt/utils/auth.py`, as one pure function."""

from __future__ import annotations

import hmac
from typing import Literal

Level = Literal["normal", "admin_optional"]
#: Probes and Prometheus need no key.
OPEN_PREFIXES = ("/health", "/ready", "/metrics")


def allowed(method: str, path: str, authorization: str | None, api_key: str | None, admin_key: str | None, level: Level) -> bool:
    """Whether a request may pass; what may not is answered 401.

    A `normal` route wants the api key when there is one, an `admin_optional` one the admin key when there is one (the api
    key is then refused there), else the api key when there is one.
    """
    if method == "OPTIONS" or path.startswith(OPEN_PREFIXES):
        return True
    wanted = (admin_key or api_key) if level == "admin_optional" else api_key
    if not wanted:
        return True
    scheme, _, key = (authorization or "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(key.encode(), wanted.encode())
