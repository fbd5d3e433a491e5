"""Observability: timelines of requests, metrics, logs and traces."""
