"""Connections of HTTP clients in tests."""

import httpx

#: An idle connection is closed before vLLM's server closes it: a request on it at that moment would fail.
LIMITS = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
