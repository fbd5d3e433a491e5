"""Durations on the command line."""

import argparse
import re

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """Parses `90`, `90s`, `10m` or `1h`.

    Raises:
        argparse.ArgumentTypeError: The text has another form, or the duration is 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)([smh]?)", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give a duration, such as 90s, 10m or 1h")
    return float(found[1]) * _UNITS_S[found[2] or "s"]
