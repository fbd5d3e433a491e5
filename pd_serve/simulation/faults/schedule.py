"""What one run consists of, as data: a cluster, its requests, and the faults."""

import enum

import msgspec

from pd_serve.simulation.faults.process_loop import ThawOrder


class FaultKind(enum.StrEnum):
    """Every kind of fault; see `ScheduledFault` for the meaning of the other fields."""

    KILL = "kill"  # SIGKILL of a process
    FREEZE = "freeze"  # SIGSTOP of a process, then SIGCONT
    HANG = "hangs for ever"  # SIGSTOP without an end; the platform ends an API server or a manager
    CLOCK = "clock jump"  # the clock of a process jumps forward by `value` seconds
    WALL = "wall clock"  # `time.time` of the target, or of all processes, jumps by `value` seconds, or back
    STEP = "step hangs"  # the step in progress of an instance does not end
    DIES_EARLY = "crash loop"  # the next `value` instances die soon after they are ready
    SLOW_START = "slow start"  # the next starts take `value` seconds more
    FAILED_START = "failed start"  # the next `value` starts fail
    LOSE_STARTS = "lost starts"  # the manager never learns of the next `value` instances that they are ready
    LOSE_STOPS = "lost stops"  # the next `value` orders of a manager to end an instance do nothing
    STARVE = "no resources"  # starts wait for resources
    POISON = "poison request"  # a request kills each instance that computes it
    CUT = "partition"  # messages from target to `other`, and back if `value` is 2, wait
    RESET = "reset"  # the same, and the waiting messages are lost at the end
    DELAY = "slow link"  # messages from target to `other` take `value` seconds more
    LOSE = "loss"  # messages from and to the target are lost with probability `value`
    LOSE_NEXT = "lost messages"  # the next `value` messages of the type `other` are lost
    DUPLICATE = "duplication"  # messages from and to the target arrive twice with probability `value`
    STALL_READS = "stalled reads"  # KV reads of the target's memory stand still
    FAIL_READS = "failed reads"  # KV reads of the target's memory, and by it, fail
    FLIP = "bit flip"  # one bit of one KV block of a running request
    REFUSE = "refused call"  # the next engine call `other` of the target is refused
    SLOW_CALL = "slow call"  # engine calls `other` of the target wait `value` seconds
    PREEMPT = "preemption"  # a running request of the target loses its blocks
    ABORT = "abort"  # the client of request `value` leaves, or of the request of the message waited for
    DRAIN = "drain"  # operations of an operator: drain the target,
    DRAIN_STOP = "drain and stop"  # drain it and stop it when it is empty,
    UNDO = "undo drain"  # use the drained instances again,
    SCALE = "scale"  # change the size of the pool `target` by `value`,
    RESTART = "rolling restart"  # replace all instances,
    MIGRATE = "migrate"  # move request `value` to the target,
    ROLE = "role change"  # change the role of the target (an order of the scheduler)
    TWIN = "second manager"  # another manager takes over while the present one still runs


class ScheduledFault(msgspec.Struct, frozen=True, omit_defaults=True):
    """One fault.

    Attributes:
        at_s: Time since the cluster has been ready.
        target: A process: "manager", "scheduler", "api:1" (of the living ones, in order), "decode:0",
            "instance:2", or "owner:3" (the instance that runs request 3).
        other: A second process, or the name of a call or of a type of message.
        for_s: Duration; 0 for faults that have none.
        value: See `FaultKind`.
        on: The fault waits from `at_s` on for the next message of this type, such as "Final", and happens
            when it is sent; then its targets may be "sender", "receiver", "request" for the request that the
            message is about, and "server" for the API server of that request.
    """

    at_s: float
    kind: FaultKind
    target: str = ""
    other: str = ""
    for_s: float = 0.0
    value: float = 0.0
    on: str = ""

    def __str__(self) -> str:
        parts = [f"{self.at_s:7.3f} s  {self.kind}"]
        parts += [self.target] if self.target else []
        parts += [f"-> {self.other}"] if self.other else []
        parts += [f"for {self.for_s:.2f} s"] if self.for_s else []
        parts += [f"value {self.value:g}"] if self.value else []
        parts += [f"at the next {self.on}"] if self.on else []
        return " ".join(parts)


class ClientRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request of a client.

    Attributes:
        segments: See `TraceRequest`.
        aborts_after: The client leaves when it has this many tokens; None if it stays.
        reads_every_s: A slow reader reads what has come once in this time; 0: a client that reads at once.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    segments: tuple[int, ...] = ()
    aborts_after: int | None = None
    reads_every_s: float = 0.0


class FaultyClusterShape(msgspec.Struct, frozen=True, omit_defaults=True):
    """The cluster of one run.

    Attributes:
        instances: Number at the start, by role.
        api_servers: Number of API servers.
        one_process: The manager runs in the process of the only API server, as with `pd-serve serve`.
        autoscale: Bounds by role.
        settings: Changed settings of the policies.
        sampled: See `EngineSettings.sampled`.
        orphan_s: Seconds that requests go on after their API server has died.
        comes_back: Clients whose API server has died ask another one for the same request.
    """

    instances: dict[str, int]
    api_servers: int = 2
    one_process: bool = False
    num_blocks: int = 96
    chunk_tokens: int | None = None
    prefix_caching: bool = False
    async_scheduling: bool = False
    autoscale: dict[str, tuple[int, int]] = {}
    policy: str = "llumnix"
    settings: dict[str, str | float] = {}
    start_instance_s: float = 2.0
    resume_order: ThawOrder = "as it came"
    sampled: bool = False
    orphan_s: float = 0.0
    comes_back: bool = False


class Schedule(msgspec.Struct, frozen=True):
    """One run, which it determines. `faults` are in the order of their times."""

    seed: int
    tier: int
    shape: FaultyClusterShape
    requests: list[ClientRequest]
    faults: list[ScheduledFault]

    def only(self, numbers: list[int]) -> "Schedule":
        """The same run with some of the faults, by index."""
        return msgspec.structs.replace(self, faults=[self.faults[n] for n in numbers])

    @property
    def last_fault_s(self) -> float:
        """The time at which the last fault has ended."""
        return max((fault.at_s + fault.for_s for fault in self.faults), default=0.0)
