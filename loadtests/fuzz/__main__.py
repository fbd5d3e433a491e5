"""Mutated frames to every listening socket: `python -m loadtests.fuzz --frames 1000000`.

Starts a cluster with keys, finds all its listening TCP ports, and sends mutated frames of their protocols:
ZeroMQ greetings and CURVE handshakes, also recorded ones of a peer that has the cluster's key, HTTP, HTTP/2
for Ray's ports, and anything to those of NIXL and gloo. Meanwhile streams are served and checked.

The exit code is 1 if a process ended, a port gave an answer that it should not give, a stream failed, a
traceback was logged, or memory, descriptors or threads of a process grew.
"""

import argparse
import secrets
import sys
from pathlib import Path

from loadtests.fuzz.campaign import FuzzCampaign
from loadtests.started_service import ClusterShape
from loadtests.terminal import say


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="loadtests.fuzz", description="Sends mutated frames to every listening socket of a cluster."
    )
    add = parser.add_argument
    add("--frames", type=int, default=1_000_000, metavar="N", help="Number of frames.")
    add("--seed", type=int, help="Seed of the frames. Default: a random one, shown.")
    add("--engine", choices=("vllm", "simulated"), default="simulated", help="Engine of the instances.")
    add("--ray-serve", action="store_true", help="The application of Ray Serve, behind HAProxy.")
    add("--out", type=Path, default=Path("results/fuzz"), help="Folder for the report and the log.")
    options = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    say(f"seed {seed}")
    key, secret = f"sk-{secrets.token_hex(16)}", secrets.token_hex(32)
    shape = ClusterShape(
        instances={"prefill": 1, "decode": 1},
        engine=options.engine,
        api_servers=2,
        under_ray_serve=options.ray_serve,
        environment={"PD_SERVE_API_KEY": key, "PD_SERVE_CLUSTER_SECRET": secret},
    )
    campaign = FuzzCampaign(
        shape=shape, frames=options.frames, seed=seed, key=key, secret=secret, out=options.out
    )
    sys.exit(campaign.execute())


if __name__ == "__main__":
    main()
