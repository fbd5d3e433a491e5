"""What one API server knows of the cluster at a moment; `/metrics` is made from it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pd_serve.comm.cluster_state import ClusterState
from pd_serve.comm.messages import InstanceStats
from router.load import InstanceLoad
from router.request import Demand


@dataclass(frozen=True, slots=True)
class ClusterReport:
    """Attributes:
    loads: Last reported loads, of all instances that have reported.
    immovable: Instances whose engines cannot move requests.
    slots: vLLM's number of each live instance, by id.
    stats: By instance id.
    stranded: Requests that wait on an instance for a decode instance to take them, by instance id.
    waiting: Requests of this API server that are bound to no instance yet.
    num_running: Requests of this API server in progress.
    num_unsent: Messages of this API server that could not be sent.
    message_errors: Messages that this API server could not handle, by kind.
    state: What the manager has last told; None before it has.
    """

    loads: Sequence[InstanceLoad]
    slots: Mapping[str, int]
    stats: Mapping[str, InstanceStats]
    stranded: Mapping[str, int]
    waiting: Demand
    num_running: int
    num_unsent: int
    state: ClusterState | None
    immovable: Collection[str] = ()
    message_errors: Mapping[str, int] = field(default_factory=dict)
