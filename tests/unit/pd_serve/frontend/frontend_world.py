"""A frontend, and the manager and instances around it in the hands of a test."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackEncoder

from migration.engine_interface import HeldRequest
from migration.messages import InstanceId, RequestId
from migration.record import MigrationRecord
from migration.token_span import crc_of
from pd_serve.api.codec import VllmCodec
from pd_serve.comm.membership import MANAGER
from pd_serve.comm.messages import AddRequest, LoadReport, MigrationEnded, RequestReport, TokenHeader
from pd_serve.comm.requests import Call, ManualMigration, MoveRequest
from pd_serve.comm.rpc import Answer
from pd_serve.errors import EngineDeadError, Refusal, RefusalCode
from pd_serve.frontend.accounts import Accounts
from pd_serve.frontend.frontend import Frontend
from router.dispatcher import Dispatcher
from router.load import InstanceLoad
from router.request import NewRequest
from tests.members import ROLES, membership
from tests.recording_wire import RecordingWire

M = TypeVar("M")
R = RequestId("r")
BLOCK_TOKENS = 16


@dataclass
class Clock:
    """The time that tokens are delivered at."""

    now: float = 100.0


class World:
    """A frontend that receives the messages of a test; p.. are prefill, d.. decode, n.. neutral instances."""

    def __init__(self, dispatcher: Dispatcher | None = None, accounts: Accounts | None = None) -> None:
        self.wire = RecordingWire("api")
        self.outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self.clock = Clock()
        self.members: list[str] = []
        self.report_number = 0
        self.frontend = Frontend(
            self.wire,
            self._find_manager,
            VllmCodec(),
            self.outputs.put_nowait,
            dispatcher or Dispatcher(),
            num_slots=8,
            accounts=accounts,
            clock=lambda: self.clock.now,
        )
        self.requests = self.frontend.requests
        self._encoder = MsgpackEncoder()

    async def _find_manager(self) -> str:
        raise EngineDeadError("the manager is absent")

    # ---- the manager

    def join(self, *names: str) -> None:
        """Instances become members, and report."""
        self.members += names
        self.tell_members()
        for name in names:
            self.report(name)

    def leave(self, name: str) -> None:
        """An instance is dead or stopped."""
        self.members = [member for member in self.members if member != name]
        self.tell_members()

    def tell_members(self) -> None:
        self.wire.hear(MANAGER, membership(*self.members, api_servers=["api"]))

    # ---- instances

    def report(self, name: str, *, stranded: Sequence[str] = (), free: int = 100, **load: Any) -> None:
        report = LoadReport(
            InstanceLoad(name, ROLES[name[0]], total_blocks=100, free_blocks=free, **load),
            [RequestId(r) for r in stranded],
        )
        self.wire.hear(name, report)

    def tokens(
        self,
        source: str,
        epoch: int,
        index: int,
        *ids: int,
        finish: FinishReason | None = None,
        of: str = "r",
        before: Sequence[int] | None = None,
        stop_reason: str | None = None,
    ) -> None:
        """An instance sends tokens. Those before them are 10, 11, 12 … by default."""
        output = EngineCoreOutput(of, list(ids), finish_reason=finish, stop_reason=stop_reason)
        frames = [bytes(frame) for frame in self._encoder.encode(EngineCoreOutputs(outputs=[output]))]
        self.wire.hear_frames(
            msgspec.msgpack.encode(
                TokenHeader(
                    source, [(epoch, index, crc_of(range(10, 10 + index) if before is None else before))]
                )
            ),
            *frames,
        )

    def holds(self, source: str, *held: HeldRequest, heartbeat: int = 1_000_000, number: int = 0) -> None:
        """An instance reports the requests that it has, by default after it has received everything."""
        self.report_number = number or self.report_number + 1
        report = RequestReport(self.report_number, heartbeat, list(held))
        self.wire.hear_frames(msgspec.msgpack.encode(TokenHeader(source, [], report)))

    def answer(self, call: Call, result: Any = None, error: str | None = None, error_class: str = "") -> None:
        [called] = [peer for peer, sent in self.sent(Call) if sent.call_id == call.call_id]
        self.wire.hear(called, Answer(call.call_id, result, error, error_class))

    def end_migration(
        self, source: str, destination: str, committed: bool, why: str = "", **more: Any
    ) -> None:
        """An instance reports the end of a migration of `r`."""
        self.wire.hear(source, ended(R, source, destination, committed, why, **more))

    # ---- the API

    def submit(self, request_id: str = "r", prompt_tokens: int = 20) -> AddRequest:
        """Returns the message to the instance."""
        payload = VllmCodec().encode_request(request(request_id, prompt_tokens))
        self.requests.submit(request_id, payload, NewRequest(prompt_tokens))
        return self.wire.sent_to(AddRequest)[-1]

    def sent(self, kind: type[M]) -> list[tuple[str, M]]:
        return self.wire.sent_with_peers(kind)

    def delivered(self) -> list[EngineCoreOutput]:
        """Everything that the API has been given since the last look."""
        found = []
        while not self.outputs.empty():
            found += self.outputs.get_nowait().outputs
        return found

    def delivered_tokens(self) -> list[int]:
        return [token for output in self.delivered() for token in output.new_token_ids]

    async def migrate(self, destination: str) -> tuple["asyncio.Task[ManualMigration]", Call]:
        """Asks for a migration of `r`. Returns its task, and the call to the instance."""
        task = asyncio.create_task(self.frontend.migrate("r", destination))
        await turns()
        return task, self.moves()[-1][1]

    def moves(self) -> list[tuple[str, Call]]:
        """Calls to move a request, with the instance that was called."""
        return [(peer, call) for peer, call in self.sent(Call) if isinstance(call.request, MoveRequest)]


async def turns() -> None:
    """Lets everything that is ready run; nothing here waits for more than a few turns of the loop."""
    for _ in range(10):
        await asyncio.sleep(0)


def request(request_id: str, prompt_tokens: int) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=list(range(prompt_tokens)),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
        arrival_time=1.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def ended(
    request_id: str, source: str, destination: str, committed: bool, why: str = "", **more: Any
) -> MigrationEnded:
    return MigrationEnded(record(request_id, source, destination, committed, why, **more))


def record(
    request_id: str,
    source: str,
    destination: str,
    committed: bool = True,
    why: str = "",
    code: RefusalCode = RefusalCode.NO_FREE_BLOCKS,
    **more: Any,
) -> MigrationRecord:
    return MigrationRecord(
        request_id=RequestId(request_id),
        source=InstanceId(source),
        destination=InstanceId(destination),
        reason="manual",
        refusal=None if committed else Refusal(code, why),
        **more,
    )
