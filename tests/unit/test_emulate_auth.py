from __future__ import annotations

import pytest

from pdbench.emulate.auth import Level, allowed

NONE, API, ADMIN, WRONG = None, "Bearer api", "Bearer admin", "Bearer wrong"


@pytest.mark.parametrize(
    ("api_key", "admin_key", "level", "pass_with"),
    [
        # SGLang 0.5.23, srt/utils/auth.py: which of the four headers open a route
        (None, None, "normal", {NONE, API, ADMIN, WRONG}),
        (None, None, "admin_optional", {NONE, API, ADMIN, WRONG}),
        ("api", None, "normal", {API}),
        ("api", None, "admin_optional", {API}),
        (None, "admin", "normal", {NONE, API, ADMIN, WRONG}),
        (None, "admin", "admin_optional", {ADMIN}),
        ("api", "admin", "normal", {API}),
        ("api", "admin", "admin_optional", {ADMIN}),
    ],
)
def test_table(api_key: str | None, admin_key: str | None, level: Level, pass_with: set[str | None]) -> None:
    for header in (NONE, API, ADMIN, WRONG):
        assert allowed("POST", "/x", header, api_key, admin_key, level) == (header in pass_with), header
        assert allowed("OPTIONS", "/x", header, api_key, admin_key, level)
        for path in ("/health", "/health_generate", "/ready", "/metrics"):
            assert allowed("GET", path, header, api_key, admin_key, level)


def test_headers_that_are_none() -> None:
    for header in ("", "Bearer", "Bearer ", "Basic api", "api", "Bearer api ", "Bearer äpi"):
        assert not allowed("GET", "/x", header, "api", None, "normal"), header
    assert allowed("GET", "/x", "bearer api", "api", None, "normal")
