"""What operators see: logs without secrets, metrics, traces."""

from carrel.observability.logs import configure_logging
from carrel.observability.metrics import MeasuredStore, Metrics
from carrel.observability.redaction import Redactor, redacted_query
from carrel.observability.tracing import Tracing, start_tracing

__all__ = [
    "MeasuredStore",
    "Metrics",
    "Redactor",
    "Tracing",
    "configure_logging",
    "redacted_query",
    "start_tracing",
]
