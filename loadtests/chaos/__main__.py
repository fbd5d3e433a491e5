"""Faults on a running cluster: `python -m loadtests.chaos --kills 200 --duration 40m`.

Starts a cluster, takes an undisturbed run of a set of requests, and sends them again and again while it kills
and freezes processes of the cluster, two at once and during operations. Every stream is compared token by
token with the undisturbed run. Writes `report.html`, `report.json` and the cluster's log.

The exit code is 1 if a token was lost, doubled or wrong, a request failed for another reason than the kill of
its API server, a healthy process ended, or the cluster did not become whole again.
"""

import argparse
import asyncio
import secrets
import sys
from pathlib import Path

from loadtests.answer import StreamError
from loadtests.chaos import schedule
from loadtests.chaos.campaign import ChaosCampaign
from loadtests.chaos.report import write_report
from loadtests.chaos.schedule import Fault, Operation, Target
from loadtests.chaos.targets import rates_of
from loadtests.durations import seconds
from loadtests.outcome import EXIT_FAILED, EXIT_OK
from loadtests.started_service import ClusterShape
from loadtests.terminal import say
from pd_serve.errors import PdServeError

#: Time before the freeze of `--freeze-service`.
SCENARIO_PAUSE_S = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="loadtests.chaos", description=(__doc__ or "").partition("\n")[0].partition(":")[0] + "."
    )
    add = parser.add_argument
    add("--kills", type=int, default=200, metavar="N", help="Number of faults: kills and freezes.")
    add("--duration", type=seconds, default=2400.0, metavar="40m", help="Time over which they are spread.")
    add("--seed", type=int, help="Seed of the schedule and the requests. Default: a random one, shown.")
    add("--ray-serve", action="store_true", help="The application of Ray Serve instead of `pd-serve serve`.")
    add("--api-servers", type=int, default=2, metavar="N", help="API servers.")
    add("--engine", choices=("vllm", "simulated"), default="vllm", help="Engine of the instances.")
    add("--cost-model", metavar="NAME|FILE", help="Speed of simulated engines.")
    add("--prefill", type=int, default=2, help="Prefill instances.")
    add("--decode", type=int, default=2, help="Decode instances.")
    add("--neutral", type=int, default=0, help="Neutral instances.")
    add("--streams", type=int, default=16, metavar="N", help="Concurrent streams.")
    add("--references", type=int, default=32, metavar="N", help="Number of different requests.")
    add("--no-restart", action="store_true", help="Without faults during a rolling restart.")
    add(
        "--freeze-service",
        type=seconds,
        metavar="40s",
        help="In the place of the schedule: one freeze of API servers and manager; no instance is replaced.",
    )
    add("--out", type=Path, default=Path("results/chaos"), help="Folder for the report.")
    options = parser.parse_args()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    say(f"seed {seed}")
    roles = {role: getattr(options, role) for role in ("prefill", "decode", "neutral")}
    shape = ClusterShape(
        instances={role: number for role, number in roles.items() if number},
        engine=options.engine,
        cost_model=options.cost_model,
        api_servers=options.api_servers,
        under_ray_serve=options.ray_serve,
    )
    faults = schedule.draw(seed, options.kills, options.duration, rates_of(shape))
    if options.no_restart:
        faults = schedule.only(faults, without={Operation.RESTART})
    if options.freeze_service is not None:
        faults = [freeze_of_the_service(shape, options.freeze_service)]
    options.out.mkdir(parents=True, exist_ok=True)
    campaign = ChaosCampaign(
        shape,
        faults,
        seed,
        options.streams,
        options.references,
        options.out,
        keep_instances=options.freeze_service is not None,
    )
    sys.exit(_run(campaign))


def freeze_of_the_service(shape: ClusterShape, for_s: float) -> Fault:
    """One freeze of manager and API servers."""
    targets = (Target.MANAGER, *[Target.API_SERVER] * shape.api_servers)
    return Fault(0, SCENARIO_PAUSE_S, targets, for_s, None, 0.0, 0)


def _run(campaign: ChaosCampaign) -> int:
    try:
        result = asyncio.run(campaign.run())
    except (PdServeError, StreamError) as error:
        say(f"FAILED: {error.text if isinstance(error, StreamError) else error}")
        return EXIT_FAILED
    except (KeyboardInterrupt, asyncio.CancelledError):
        say("interrupted; all started processes have ended")
        return 130
    write_report(result, campaign.out)
    summary = result.as_json()["summary"]
    say(
        f"{summary['faults']} faults ({summary['kills']} kills, {summary['freezes']} freezes), "
        f"{summary['streams']} streams, {summary['tokens']} tokens, {summary['failed']} failed, "
        f"{summary['excused']} excused, {summary['refusals']} refusals, "
        f"longest pause {summary['longest_pause_s']:.1f} s"
    )
    for problem in result.problems:
        say(f"FAILED: {problem}")
    say(f"report: {campaign.out / 'report.html'}")
    return EXIT_FAILED if result.problems else EXIT_OK


if __name__ == "__main__":
    main()
