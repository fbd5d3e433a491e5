"""Every message between processes survives encoding and decoding."""

from types import UnionType
from typing import Any, get_args

import msgspec
import pytest

from migration.engine_interface import HeldBlocks, HeldRequest
from migration.messages import (
    NO_BLOCK,
    BlockRun,
    Committed,
    Confirmed,
    CopyStage,
    Dropped,
    Final,
    FinalState,
    InstanceId,
    KeepAlive,
    KvPart,
    MigrationId,
    Offer,
    Pull,
    Query,
    Refused,
    RequestDescription,
    RequestId,
    Stage,
    Withdraw,
)
from migration.prefix_messages import (
    PrefixAsk,
    PrefixConfirmed,
    PrefixOffer,
    PrefixRead,
    PrefixRefused,
)
from pd_serve.comm.cached_blocks import CachedBlocks, FollowCachedBlocks, packed
from pd_serve.comm.cluster_state import (
    ClusterState,
    PastDecision,
    ProcessStats,
    RestartState,
    ScaledCount,
    SchedulerState,
    SchedulerStats,
    StartingInstance,
)
from pd_serve.comm.membership import ApiServerInfo, ApiServerStatus, Join, LoraAdapter
from pd_serve.comm.messages import (
    AbortRequests,
    AddRequest,
    Decision,
    HandOff,
    Heartbeat,
    InstanceStats,
    LoadReport,
    MigrationEnded,
    MoveOut,
    RequestFailed,
    RequestReport,
    ResendTokens,
    SchedulerReport,
    SetDraining,
    SetRole,
    StartInstance,
    StopInstance,
    ToApiServer,
    ToInstance,
    TokenHeader,
    ToManager,
    ToScheduler,
)
from pd_serve.comm.requests import (
    AbortByName,
    Adopt,
    AnyRequest,
    Call,
    CallEngine,
    CheckIntegrity,
    CountedSlot,
    DrainInstance,
    FindOrphan,
    FindRequests,
    Holdings,
    ListHoldings,
    ListRequests,
    LoadAdapter,
    ManualMigration,
    MigrateByName,
    MoveRequest,
    OrphanAnswer,
    ReadMetrics,
    ReadRecent,
    RestartInstances,
    ScalePools,
    UnloadAdapter,
)
from pd_serve.comm.rpc import Answer
from pd_serve.errors import RefusalCode
from router.load import InstanceLoad
from router.plugins import PolicyChoice
from router.request import Demand
from tests.members import membership
from tests.unit.pd_serve.made_migrations import FULL, migrated

R = RequestId("r")
M = MigrationId("m")
PROCESS = ProcessStats(1.5, 2.0, 3.0)
STATS = SchedulerStats(PROCESS, 3, {"balance": 1}, {"start": 2}, ["a problem"])
LOAD = InstanceLoad("d0", "decode", total_blocks=100, free_blocks=7, draining=True, requests_added=4)
RECORD = migrated(copies=(CopyStage(0.0, 0.5, 3),), refusal=FULL, stages=1)
RESERVED = RequestDescription(R, [b"\x00\xff"], "tcp://api/tokens", 1, 2, [5, 6], 10, 100, {"model": "tiny"})

MESSAGES: list[Any] = [
    membership("p0", "d0", api_servers=["api"], scheduler="tcp://s", starting={"decode": 1}, leaving=["d0"]),
    Heartbeat(Demand(2, 300)),
    AddRequest(R, "tcp://api/tokens", 1000, ["d0"], [1, 2]),
    AddRequest(R, "tcp://api/tokens", 0, None, []),
    AbortRequests([R], 7),
    ResendTokens([(R, 3)]),
    FollowCachedBlocks(),
    CachedBlocks("tcp://d0", 3, packed([1, 2**64 - 1]), packed([]), True),
    HandOff(R, "d0"),
    MoveOut(LOAD, "balance", PolicyChoice("shortest")),
    SetRole("decode"),
    SetDraining(True, by_operator=True),
    LoadReport(LOAD, [R], InstanceStats(PROCESS, 1, 2, 3, 4, 5)),
    MigrationEnded(RECORD),
    RequestFailed(R, "ValueError: why"),
    RequestFailed(R, "why", is_invalid=True),
    ClusterState(
        starting=[StartingInstance("d9", "decode", "waits")],
        scheduler=SchedulerState("alive", "llumnix", 7, 2),
        scaled=[ScaledCount("start", "decode", 1)],
        decisions=[PastDecision(1.0, "d1 is drained")],
        restart=RestartState(True, "1 of 3"),
        scheduler_stats=STATS,
        problems=["a problem"],
    ),
    ApiServerStatus(requests=3, waiting=2, connections=9),
    Join(ApiServerInfo("tcp://api", "tcp://api/tokens", pid=7), ["d0"], 7),
    StartInstance("decode", "too full"),
    StopInstance("d0", "empty"),
    SchedulerReport([Decision("d0", "is drained", "too large")], STATS),
    Call("call", CheckIntegrity()),
    Answer("call", None, "full", "MigrationRefusedError", RefusalCode.NO_FREE_BLOCKS),
    Offer(M, "handoff", RESERVED, b"endpoint"),
    Refused(M, FULL),
    Pull(M, 3),
    Stage(M, KvPart(32, [BlockRun(0, [1, NO_BLOCK])])),
    Final(M, FinalState(KvPart(11, [BlockRun(2, [3]), BlockRun(2, [])], [4]), 1, [5, 6], 11, b"state")),
    KeepAlive(M),
    Withdraw(M, FULL),
    Query(M),
    Committed(M, 4096),
    Confirmed(M),
    Dropped(M, FULL),
    PrefixAsk(M, [b"hash"], 31, {"model": "tiny"}),
    PrefixOffer(M, KvPart(32, [BlockRun(0, [1, NO_BLOCK])]), b"endpoint"),
    PrefixRefused(M, FULL),
    PrefixRead(M),
    PrefixConfirmed(M),
]

REQUESTS: list[Any] = [
    CheckIntegrity(),
    ListRequests("tcp://api/tokens"),
    ListHoldings(),
    CallEngine("list_loras", ["x", 1, None]),
    MoveRequest(R, InstanceId("d0"), blocking=True),
    DrainInstance("d0", True, True),
    ScalePools({"decode": 3}),
    RestartInstances(),
    LoadAdapter(LoraAdapter("french", "/adapters/french", "tiny", True), True),
    UnloadAdapter("french"),
    MigrateByName("r", "d0"),
    FindRequests("r"),
    FindOrphan("cmpl-mine-0.5d21"),
    Adopt(R, "tcp://api/tokens", [b"request"]),
    ReadMetrics(),
    ReadRecent(12),
    AbortByName(["cmpl-1"]),
]

#: Results of remote calls that are no plain values.
RESULTS: list[tuple[Any, Any]] = [
    (MoveRequest, RECORD),
    (FindOrphan, OrphanAnswer("doubtful", 7)),
    (MigrateByName, ManualMigration(RECORD, 0.0085)),
    (AbortByName, 2),
    (ReadRecent, [CountedSlot(12, {3: 4}, {5: 6}, 10, 2, 1)]),
    (ListHoldings, Holdings([HeldBlocks(R, 3, True)], [(R, InstanceId("d0"), "balance")])),
]

CHANNELS = {"instance": ToInstance, "API server": ToApiServer, "manager": ToManager, "scheduler": ToScheduler}


def decoded(value: Any, kind: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=kind)


def members(union: UnionType) -> set[type]:
    return set(get_args(union))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_equal_after_encoding_and_decoding(message: object) -> None:
    channels = [channel for channel in CHANNELS.values() if type(message) in members(channel)]

    assert channels
    for channel in channels:
        assert decoded(message, channel) == message


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_a_request_is_equal_after_encoding_and_decoding_its_call(request_: Any) -> None:
    assert decoded(Call("call", request_), ToInstance) == Call("call", request_)


@pytest.mark.parametrize(
    ("request_type", "result"), RESULTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_result_is_equal_after_its_answer_is_decoded_and_converted(request_type: Any, result: Any) -> None:
    answer = decoded(Answer("call", result), ToApiServer)

    assert msgspec.convert(answer.result, request_type.result_type()) == result


def test_every_type_of_message_and_of_request_is_tested() -> None:
    assert {type(message) for message in MESSAGES} == set[type]().union(*map(members, CHANNELS.values()))
    assert {type(request) for request in REQUESTS} == members(AnyRequest)


@pytest.mark.parametrize("channel", CHANNELS)
def test_an_unknown_tag_is_an_error(channel: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="NoSuchMessage"):
        decoded({"type": "NoSuchMessage"}, CHANNELS[channel])


def test_a_message_of_another_channel_is_an_error() -> None:
    with pytest.raises(msgspec.ValidationError, match="StopInstance"):
        decoded(StopInstance("d0", "empty"), ToInstance)


@pytest.mark.parametrize(
    "header",
    [
        TokenHeader("d0", [(0, 5, 2**32 - 1), (1, 7, 0)]),
        TokenHeader("d0", [], RequestReport(3, 7, [HeldRequest(R, 1, 5), HeldRequest(R, 2, 6, True)])),
    ],
    ids=["tokens", "report"],
)
def test_the_header_of_tokens_is_equal_after_encoding_and_decoding(header: TokenHeader) -> None:
    assert decoded(header, TokenHeader) == header
