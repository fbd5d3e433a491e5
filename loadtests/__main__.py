"""`make loadtest`: a cluster of simulated engines under a rising and falling load, with a drain at its peak.

    python -m loadtests [--layout disaggregated|neutral] [--seconds 120] [--rate 4] [--out DIR]

Writes `report.html`, `report.png`, `report.json`, `samples.json` and logs. The exit code is 1 if a stream was
wrong, a request failed, or the cluster violates an invariant at the end.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from loadtests.cluster_load_test import LAYOUTS, ClusterLoadTest
from loadtests.outcome import EXIT_FAILED
from loadtests.terminal import say
from pd_serve.errors import PdServeError


def main() -> None:
    parser = argparse.ArgumentParser(prog="loadtests", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layout", choices=LAYOUTS, default="disaggregated", help="Kind of cluster.")
    parser.add_argument("--out", type=Path, default=Path("results/loadtest"), help="Folder for the report.")
    parser.add_argument("--seconds", type=float, default=120.0, help="Duration of the arrivals.")
    parser.add_argument(
        "--rate", type=float, default=4.0, help="Mean requests/s; 1.8 times that at the peak."
    )
    options = parser.parse_args()
    test = ClusterLoadTest(options.layout, options.out, options.seconds, options.rate)
    try:
        code = asyncio.run(test.run())
    except PdServeError as error:
        say(f"FAILED: {error}")
        code = EXIT_FAILED
    except KeyboardInterrupt:
        say("interrupted; all started processes have ended")
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
