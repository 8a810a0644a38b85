"""What Prometheus is told."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
PICTURES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("vitrail_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "vitrail_request_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("vitrail_requests_in_flight", "Requests being read or answered.", registry=registry)
        self.queue = Gauge("vitrail_queue_pictures", "Pictures that wait for the worker.", registry=registry)
        self.up = Gauge("vitrail_worker_up", "1 while a worker takes jobs.", registry=registry)
        self.losses = Counter(
            "vitrail_worker_losses", "Workers that crashed, or were stuck and stopped.", registry=registry
        )
        self._pictures = Counter(
            "vitrail_pictures", "Pictures computed.", ["model", "kind", "outcome"], registry=registry
        )
        self._batches = Histogram(
            "vitrail_batch_pictures", "Pictures in a batch.", ["model"], buckets=PICTURES, registry=registry
        )
        self._computing = Histogram(
            "vitrail_batch_seconds",
            "Decoding and computing a batch.",
            ["model", "kind"],
            buckets=SECONDS,
            registry=registry,
        )

    def note_batch(self, model: str, kind: str, pictures: int, unreadable: int, seconds: float) -> None:
        """Count a batch that has been answered."""
        self._pictures.labels(model, kind, "answered").inc(pictures - unreadable)
        self._pictures.labels(model, kind, "unreadable").inc(unreadable)
        self._batches.labels(model).observe(pictures)
        self._computing.labels(model, kind).observe(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' format."""
        return generate_latest(self._registry)
