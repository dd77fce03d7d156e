"""What the service counts, for Prometheus."""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Counters:
    """The metrics of one service, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        here = {"registry": self.registry}
        self.requests = Counter(
            "ehi_requests", "Answered requests", ["path", "status"], **here
        )
        self.seconds = Histogram(
            "ehi_request_seconds", "From a request's head to the end of its answer",
            ["path"], buckets=_SECONDS, **here,
        )  # fmt: skip
        self.batches = Histogram(
            "ehi_batch_queries", "Queries of one search", buckets=_SIZES, **here
        )
        self.search_seconds = Histogram(
            "ehi_search_seconds", "One search, texts encoded", buckets=_SECONDS, **here
        )
        self.waiting = Gauge("ehi_waiting_requests", "Not answered yet", **here)
        self.documents = Gauge("ehi_documents", "Documents in the index", **here)
        self.generation = Gauge("ehi_index_generation", "Of the manifest", **here)
        self.refreshes = Counter(
            "ehi_index_refreshes", "States taken over from other processes", **here
        )
        self.stale = Gauge("ehi_index_stale", "1 if the folder can't be read", **here)

    def text(self) -> bytes:
        """All metrics in Prometheus's format."""
        return generate_latest(self.registry)
