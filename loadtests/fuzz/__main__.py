"""Mutated frames to every listening socket: `python -m loadtests.fuzz --frames 1000000`.

Starts a cluster with keys, finds all its listening TCP ports, and sends mutated frames of their protocols:
ZeroMQ greetings and CURVE handshakes, also recorded ones of a peer that has the cluster's key, HTTP, HTTP/2
for Ray's ports, and anything to those of NIXL and gloo. Meanwhile streams are served and checked.

The exit code is 1 if a process ended, a port gave an answer that it should not give, a stream failed, a
traceback was logged, or memory, descriptors or threads of a process grew.
"""

import argparse
import asyncio
import secrets
import sys
from pathlib import Path

from loadtests.answer import StreamError
from loadtests.fuzz.campaign import FuzzCampaign
from loadtests.outcome import EXIT_FAILED, EXIT_OK
from loadtests.started_service import ClusterShape
from loadtests.terminal import say
from pd_serve.errors import PdServeError
from pd_serve.observe.provenance import provenance, write


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
        api_servers=2 if options.ray_serve else 1,
        under_ray_serve=options.ray_serve,
        environment={"PD_SERVE_API_KEY": key, "PD_SERVE_CLUSTER_SECRET": secret},
    )
    options.out.mkdir(parents=True, exist_ok=True)
    campaign = FuzzCampaign(shape, options.frames, seed, key, secret, options.out)
    sys.exit(_run(campaign))


def _run(campaign: FuzzCampaign) -> int:
    try:
        asyncio.run(campaign.run())
    except (PdServeError, StreamError) as error:
        detail = f": {error.detail}" if isinstance(error, StreamError) else ""
        campaign.problems.append(f"{error}{detail}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("interrupted; all started processes have ended")
        return 130
    report = {"seed": campaign.seed, "problems": campaign.problems, **campaign.numbers}
    write(campaign.out / "report.json", provenance() | report)
    for problem in campaign.problems:
        say(f"FAILED: {problem}")
    if not campaign.problems:
        total = sum(campaign.numbers["frames"].values())
        say(f"{total:,} frames in {campaign.numbers['seconds']:.0f} s: no crash, no answer, no growth")
    say(f"report: {campaign.out / 'report.json'}")
    return EXIT_FAILED if campaign.problems else EXIT_OK


if __name__ == "__main__":
    main()
