"""Every heartbeat, lease and bounded wait between processes, in seconds.

The bounds of a migration are in `migration.bounds`, the intervals of decisions in `router.policies`.
"""

#: Between two heartbeats: the manager's membership, and what an API server tells the manager, the instances
#: and the scheduler. Instances report their load at least twice as often.
HEARTBEAT_S = 1.0
INSTANCE_HEARTBEAT_S = 0.5

#: Leases. A process that has sent nothing for this long counts as gone.
MANAGER_LEASE_S = 3.0  # API servers look for the manager anew, and show it as absent
SCHEDULER_LEASE_S = 3.0  # shown as absent
API_SERVER_LEASE_S = 30.0  # the manager takes it out of the membership, and instances end its requests
INSTANCE_LEASE_S = 30.0  # the manager ends its process and takes it out of the membership

#: An instance or scheduler ends itself when neither manager nor API servers have sent anything for this long.
ORPHAN_S = 120.0


#: Bound of one remote call.
CALL_TIMEOUT_S = 60.0

#: Bound of starting one instance, waiting for resources included.
START_TIMEOUT_S = 600.0

#: Exponential backoff between failed starts of instances: initial and maximum.
START_BACKOFF_S, MAX_START_BACKOFF_S = 5.0, 120.0

#: An instance that dies within this time after its start counts as a failed start.
EARLY_DEATH_S = 60.0

#: A scheduler that dies within this time is started again after a pause, which grows up to the maximum.
EARLY_SCHEDULER_DEATH_S, MAX_SCHEDULER_PAUSE_S = 10.0, 10.0

#: How long an instance that the scheduler found empty may still be used by API servers. After this it is
#: stopped all the same, and its requests are recomputed elsewhere.
STOP_PATIENCE_S = 10.0

#: Between two looks at a condition that no message announces.
POLL_S = 0.05

#: Least time between two load reports; between two that differ in blocks only; between two with statistics.
REPORT_INTERVAL_S = 0.02
PROGRESS_REPORT_INTERVAL_S = 0.1
STATS_INTERVAL_S = 1.0

#: A new scheduler waits for the first load report of every instance, but no longer than this.
FIRST_REPORTS_S = 2.0

#: Between two requests to hand off a request that waits on its prefill instance for a decode instance.
HANDOFF_RETRY_S = 0.25

#: How long an integrity check repeats while it finds something that may be on its way.
INTEGRITY_SETTLE_S = 3.0
