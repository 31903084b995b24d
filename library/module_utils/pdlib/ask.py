"""One HTTP request, of which nothing is raised: what came, or why nothing did."""

from __future__ import annotations

import functools
import http.client
import json
import urllib.error
import urllib.request
from typing import Any, Dict, List, Optional, Tuple

from . import tls


@functools.lru_cache(maxsize=4)
def opener(ca: str = "") -> urllib.request.OpenerDirector:
    """Return what sends requests past proxies; ``ca``: certificates (PEM) that alone are trusted, "" for the system's."""
    handlers: List[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if ca:
        handlers.append(urllib.request.HTTPSHandler(context=tls.trusting(ca)))
    return urllib.request.build_opener(*handlers)


def request(
    method: str, url: str, key: Optional[str] = None, body: Optional[Dict[str, Any]] = None, timeout_s: float = 5.0, ca: str = ""
) -> Tuple[int, str]:
    """Return (HTTP status, text); status 0 and the reason when there was no answer. ``key``: goes as a bearer token."""
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with opener(ca).open(call, timeout=timeout_s) as answer:
            return int(answer.status), answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return 0, str(getattr(error, "reason", error)) or type(error).__name__
