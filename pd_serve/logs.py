"""Logs of the service's processes: one line per event, the request's id in it."""

import logging
import os
import warnings


def configure_logging() -> None:
    """Level from `PD_SERVE_LOG_LEVEL` (default INFO; DEBUG adds a line per hand-off)."""
    level = os.environ.get("PD_SERVE_LOG_LEVEL", "INFO").upper()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", force=True)
    for ours in ("pd_serve", "migration", "router"):
        logging.getLogger(ours).setLevel(level)
    # Said on every start on a CPU, by libraries, about nothing that the user could change.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\..*")
