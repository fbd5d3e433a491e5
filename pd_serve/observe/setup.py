"""The recorder of an API server, with all its observers."""

import logging
import time

from pd_serve.observe import request_log
from pd_serve.observe.metrics import RequestMetrics
from pd_serve.observe.recorder import Observer, RequestRecorder


def make_recorder(*also: Observer, log_requests: bool, traced: bool) -> RequestRecorder:
    """The recorder of an API server; its clock is `time.monotonic`.

    Args:
        also: Further observers.
        log_requests: Logs the steps of requests at level INFO, not DEBUG.
        traced: Exports spans.
    """
    unix_offset_s = time.time() - time.monotonic()
    observers: list[Observer] = [RequestMetrics(), *also]
    level = logging.INFO if log_requests else logging.DEBUG
    if request_log.logger.isEnabledFor(level):
        observers.append(request_log.RequestLog(level))
    if traced:
        from pd_serve.observe.tracing import RequestTracer

        observers.append(RequestTracer(unix_offset_s))
    return RequestRecorder(observers, unix_offset_s=unix_offset_s)
