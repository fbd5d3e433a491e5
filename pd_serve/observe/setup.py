"""Who hears of requests in an API server that serves."""

import logging
import time

from pd_serve.observe import request_log
from pd_serve.observe.recorder import Observer, RequestRecorder
from pd_serve.observe.request_metrics import RequestMetrics


def make_recorder(*also: Observer, log_requests: bool, traced: bool) -> RequestRecorder:
    """For the clock `time.monotonic`.

    Args:
        also: Hear of everything, too.
        log_requests: Their lines are for everybody to see, not for debugging only.
        traced: Spans are exported.
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
