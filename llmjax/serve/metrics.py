"""What a monitoring system reads at /metrics, in the Prometheus format."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence

import prometheus_client
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmjax.serve.replies import Row
from llmjax.serve.scheduler import Scheduler


class Metrics:
    """Counters of one server."""

    def __init__(self, scheduler: Scheduler):
        self.registry = prometheus_client.CollectorRegistry()
        self._responses = prometheus_client.Counter(
            "llmjax_responses", "Responses by endpoint and status", ["endpoint", "status"], registry=self.registry)
        self._seconds = prometheus_client.Histogram(
            "llmjax_response_seconds", "Time until the last byte", ["endpoint"], registry=self.registry,
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100))
        self._tokens = prometheus_client.Counter(
            "llmjax_tokens", "Tokens read and written", ["kind"], registry=self.registry)
        for name, what, read in (("waiting", "Requests in the queue", lambda: scheduler.num_waiting),
                                 ("running", "Requests being decoded", lambda: scheduler.num_running)):
            prometheus_client.Gauge(f"llmjax_requests_{name}", what, registry=self.registry).set_function(read)

    def count_tokens(self, rows: Sequence[Row]) -> None:
        """Add a request's tokens, however far it came."""
        self._tokens.labels("prompt").inc(sum(len(row.request.prompt_ids) for row in rows))
        self._tokens.labels("completion").inc(sum(len(row.tokens) for row in rows))

    def count_response(self, endpoint: str, status: int, seconds: float) -> None:
        """Add one response."""
        self._responses.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def render(self) -> bytes:
        """The text that is scraped."""
        return prometheus_client.generate_latest(self.registry)


class CountResponses:
    """ASGI middleware around the application; endpoints that do not exist share one label."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, endpoints: Container[str]):
        self._app, self._metrics, self._endpoints = app, metrics, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, start = 499, time.perf_counter()  # 499: the client left before there was an answer

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
            self._metrics.count_response(endpoint, status, time.perf_counter() - start)
