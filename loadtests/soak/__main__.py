"""Mixed load for a long time, or overload: `python -m loadtests.soak --duration 60m`.

The mixed load has checked streams, short and long, of both APIs, some with high priority, and beside them
clients that leave, requests with n = 2 and, on real engines, a JSON schema. Writes what every process used
over time. `--overload` tries 600 streams, slow readers, 5,000 connections and a request with 1,000 prompts.

The exit code is 1 if a token was wrong, a request failed, memory, descriptors or threads of a process grew,
or a block, request or table row was left at the end.
"""

import argparse
import resource
import secrets
import sys
from pathlib import Path

from loadtests.durations import seconds
from loadtests.soak.campaign import SoakCampaign
from loadtests.started_service import ClusterShape
from loadtests.terminal import say


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="loadtests.soak", description="Mixed load for a long time, or overload."
    )
    add = parser.add_argument
    add("--duration", type=seconds, default=3600.0, metavar="60m", help="Duration of the mixed load.")
    add("--overload", action="store_true", help="Overload instead of the mixed load.")
    add("--seed", type=int, help="Seed of the requests. Default: a random one, shown.")
    add("--streams", type=int, default=12, metavar="N", help="Concurrent checked streams.")
    add("--engine", choices=("vllm", "simulated"), default="vllm", help="Engine of the instances.")
    add("--prefill", type=int, default=1, help="Prefill instances.")
    add("--decode", type=int, default=2, help="Decode instances.")
    add("--ray-serve", action="store_true", help="The application of Ray Serve instead of `pd-serve serve`.")
    add("--api-servers", type=int, default=2, metavar="N", help="API servers.")
    add("--out", type=Path, default=Path("results/soak"), help="Folder for the report and the log.")
    options = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    say(f"seed {seed}")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # of the service, too, which inherits it
    shape = ClusterShape(
        instances={"prefill": options.prefill, "decode": options.decode},
        engine=options.engine,
        api_servers=options.api_servers,
        under_ray_serve=options.ray_serve,
    )
    campaign = SoakCampaign(
        shape=shape,
        duration_s=options.duration,
        seed=seed,
        streams=options.streams,
        overload=options.overload,
        out=options.out,
    )
    sys.exit(campaign.execute())


if __name__ == "__main__":
    main()
