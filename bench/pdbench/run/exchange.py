"""One request and its answer, as the sending process keeps them; and where requests go."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


class Exchange:
    """One request and its answer; times are `time.perf_counter` seconds, ``sent`` is NaN when nothing was written.

    ``parts`` is the body as it came; the k-th read brought ``lengths[k]`` bytes of it at ``stamps[k]``. ``error`` is ""
    when the response ended as HTTP says.
    """

    __slots__ = (
        "connection",
        "content_type",
        "ended",
        "error",
        "index",
        "lengths",
        "parts",
        "sent",
        "stamps",
        "status",
        "wanted",
    )

    def __init__(self, index: int, wanted: float) -> None:
        """Begin with nothing; ``index`` names the request, ``wanted`` is when it was to be sent."""
        self.index = index
        self.wanted = wanted
        self.sent = self.ended = float("nan")
        self.status = 0
        self.content_type = ""
        self.stamps = array("d")
        self.lengths = array("L")
        self.parts: list[bytes] = []
        self.error = ""
        self.connection: object = None


@dataclass(frozen=True)
class Endpoint:
    """Where requests go, what stands in the head of every one, and how long each may last in all.

    ``ca``: certificates (PEM) that alone are trusted over https, "" for the system's.
    """

    url: str
    path: str
    headers: Mapping[str, str]
    timeout_s: float
    ca: str = ""

    def head(self) -> bytes:
        """Return the request's head up to the number of bytes in its body."""
        fields = {"Host": urlsplit(self.url).netloc.rpartition("@")[2], "Content-Type": "application/json"}
        fields |= {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "pdbench", **self.headers}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "Content-Length: "]
        return "\r\n".join(lines).encode("latin-1")
