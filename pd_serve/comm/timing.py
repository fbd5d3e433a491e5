"""Every heartbeat, lease and bounded wait between processes, in seconds.

The bounds of a migration are in `migration.bounds`, the intervals of decisions in `router.policies`.
"""

#: Interval of heartbeats: the manager's membership; an API server's messages to manager, instances and
#: scheduler. Instances report their load about as often, or more often.
HEARTBEAT_S = 1.0
INSTANCE_HEARTBEAT_S = 0.5

#: Interval at which instances report their requests to API servers.
REQUEST_REPORT_INTERVAL_S = INSTANCE_HEARTBEAT_S

#: Leases. A process that has sent nothing for this long counts as gone.
MANAGER_LEASE_S = 3.0  # API servers show the manager as absent, and look for its address again
SCHEDULER_LEASE_S = 3.0  # the manager shows the scheduler as absent
SCHEDULER_HANG_S = 15.0  # the manager ends its process and starts another one
API_SERVER_LEASE_S = 30.0  # the manager removes it from the membership; its requests are orphans then
INSTANCE_LEASE_S = 30.0  # the manager removes it from the membership and ends its process

#: An API server whose heartbeats an instance has not received for this long reads its requests no more, and
#: clients that ask another API server get them there. That one waits a little longer to find out, asks at
#: this interval, and waits this long for each answer; then it serves a new request.
READER_SILENCE_S, FIND_ORPHAN_S = 3.0, 4.5
FIND_INTERVAL_S, FIND_CALL_S, ADOPT_S = 0.25, 0.5, 5.0

#: Interval at which a manager looks whether another one has taken over.
TERM_CHECK_S = 5.0

#: An instance or scheduler ends itself when neither manager nor API servers have sent anything for this long.
ORPHAN_S = 120.0

#: Bound of one engine step, after which the manager replaces the instance like a silent one. The first steps
#: of an engine may compile kernels for minutes, and have a bound of their own. (vLLM's executor gives a step
#: 300 s, compilation included: `VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`.)
STEP_S, FIRST_STEPS_S, FIRST_STEPS = 120.0, 600.0, 100

#: Timeout of one remote call; of a call of another API server for its metrics, without which a scrape shows
#: those of the others.
CALL_TIMEOUT_S, METRICS_CALL_S = 60.0, 2.0

#: Timeout of the start of one instance, including the wait for resources, and of the scheduler.
START_TIMEOUT_S, SCHEDULER_START_TIMEOUT_S = 600.0, 120.0

#: Interval at which the start of an instance is ordered again: an order or its answer may be lost.
START_ORDER_S = 10.0

#: Timeout of one call to Ray at the take-over of a manager.
RAY_CALL_S = 30.0

#: Timeout of each half of an API server's start under `pd-serve serve`: until vLLM's flags are parsed, and
#: from then until it serves. Its end: its requests have a bounded time, and are aborted then.
API_SERVER_START_S, API_SERVER_STOP_S = 300.0, 6.0

#: Exponential backoff between failed starts of instances, or API servers: initial and maximum.
START_BACKOFF_S, MAX_START_BACKOFF_S = 5.0, 120.0

#: An instance or API server that dies within this time after its start has died early.
EARLY_DEATH_S = 60.0

#: A scheduler that dies within this time after its start has died early.
EARLY_SCHEDULER_DEATH_S = 10.0

#: Maximum pause before the next start after an early death, which is longer each time: what was ready can
#: start. It is far below `RECOVERY_S`: repeated kills may not keep requests waiting for longer.
MAX_DEATH_PAUSE_S = 10.0

#: Maximum wait until no API server uses an instance that the scheduler found empty. Then it is stopped, and
#: its remaining requests are recomputed elsewhere.
STOP_PATIENCE_S = 10.0

#: Maximum time of a drain that ends with the stop of the instance: by an operator, a smaller pool, a restart.
#: Then it is stopped, and its remaining requests are recomputed elsewhere.
DRAIN_TIMEOUT_S = 600.0

#: Polling interval of a condition that no message announces.
POLL_S = 0.05

#: Minimum interval of load reports; of reports that differ in blocks only; of reports of the blocks in the
#: prefix cache; of reports with statistics.
REPORT_INTERVAL_S = 0.02
PROGRESS_REPORT_INTERVAL_S = 0.1
CACHE_REPORT_INTERVAL_S = 0.1
STATS_INTERVAL_S = 1.0

#: Load reports per second of all instances together, so that receivers can keep up: with more than 16
#: instances each reports less often than every `REPORT_INTERVAL_S`, down to this interval.
MAX_REPORTS_PER_S, MAX_REPORT_INTERVAL_S = 800.0, 1.5

#: Minimum interval at which API servers tell each other what they have: how exact the limits are that count
#: for all of them together.
STATUS_INTERVAL_S = 0.05

#: Maximum wait of a new scheduler for the first load report of every instance.
FIRST_REPORTS_S = 2.0

#: Maximum wait of a request whose instance has died for another instance. Then its client gets an error.
RECOVERY_S = 120.0

#: Deaths within this time of each other count as one: for a request, which had no time to cause the later
#: ones, and for the backoff of starts.
DEATH_CHAIN_S = 1.0

#: A request that may have ended its instances runs alone among such requests, on trial: at least this long,
#: and until its first token; at most `MAX_TRIAL_S`. After `FORGIVEN_S` without a death it is no suspect.
TRIAL_S, MAX_TRIAL_S, FORGIVEN_S = 0.25, 30.0, 60.0

#: Minimum interval at which an API server asks an instance for all blocks in its prefix cache.
CACHE_ASK_INTERVAL_S = 1.0

#: Minimum interval of attempts to hand off a stranded request, and of looks for such requests.
HANDOFF_RETRY_S = 0.25
STRANDED_CHECK_S = 0.1

#: Time for which orders to move a request to an instance choose others than one that has not got there.
REFUSED_MOVE_S = 2.0

#: Interval of the integrity checks that run by themselves, and of the looks of one such check.
INTEGRITY_INTERVAL_S, INTEGRITY_LOOK_S = 60.0, 5.0

#: Maximum time that an integrity check repeats until messages and requests in transit have arrived.
INTEGRITY_SETTLE_S = 3.0
