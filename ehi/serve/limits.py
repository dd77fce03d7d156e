"""What one client, and all of them together, may ask of the service, and from where."""

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of the service. What is beyond them is refused in one sentence.

    Attributes:
        queries: texts or vectors of one request.
        k: results of a query.
        rerank: candidates of a query that are scored again.
        characters: of a text, and of a filter.
        ids: in `allow` or `deny`.
        body_bytes: of one request.
        body_seconds: for sending the head of a request, its body, or for reading part
            of the answer.
        waiting: requests that wait for the index or are being answered.
        connections: open at once.
        batch_queries: texts or vectors of one search.
        batch_seconds: a query waits so long for others to join it; it waits longer
            only while the index is busy.
    """

    queries: int = 64
    k: int = 1000
    rerank: int = 10_000
    characters: int = 10_000
    ids: int = 10_000
    body_bytes: int = 2**20
    body_seconds: float = 10.0
    waiting: int = 256
    connections: int = 500
    batch_queries: int = 64
    batch_seconds: float = 0.002


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
