"""One simulated instance: the real llumlet on a simulated engine, KV transport and wire."""

import logging
from collections.abc import Callable, Collection
from typing import Any, Protocol

from migration.bounds import MigrationBounds
from migration.messages import InstanceId
from migration.token_span import TokenSpan
from migration.transport.local import LocalTransport
from pd_serve.comm.membership import InstanceInfo
from pd_serve.comm.message_wire import MessageWire
from pd_serve.comm.messages import RequestReport, TokenHeader
from pd_serve.instance.llumlet import Llumlet
from pd_serve.simulated_engine.faults import EngineFaults
from pd_serve.simulated_engine.outputs import SimulatedBatch, SimulatedOutput, decode_payload
from pd_serve.simulated_engine.simulated_engine import SimulatedEngine
from pd_serve.simulation.config import SimulationConfig
from pd_serve.simulation.simulated_network import SimulatedFabric

logger = logging.getLogger(__name__)


class TokenWire(MessageWire, Protocol):
    """A wire that also sends tokens."""

    def send_to(self, address: str, frames: list[Any]) -> None:
        """Sends a step's tokens to the token endpoint of an API server."""
        ...


class SimulatedInstance:
    """An instance of a simulated cluster.

    Args:
        on_fatal: Ends the process of the instance; by default, the failure is kept.
        itl_target_s: See `pd_serve.instance.load_reporter`.
        delivery_s: Returns the time that a token takes to its API server; see `EngineSteps`.

    Attributes:
        faults: Faults of its engine, none at first.
        failure: Unexpected failure of the engine or of a migration; None if there was none.
    """

    def __init__(
        self,
        name: str,
        role: str,
        config: SimulationConfig,
        wire: TokenWire,
        fabric: SimulatedFabric,
        started_at: float,
        on_fatal: Callable[[BaseException], None] | None = None,
        faults: EngineFaults | None = None,
        itl_target_s: float = 0.0,
        delivery_s: Callable[[], float] | None = None,
    ) -> None:
        self.name = name
        self.role = role
        self.started_at = started_at
        self.failure: BaseException | None = None
        self.wire = wire
        self._fabric = fabric
        self._node = config.network.node_of(name)
        self.transport: LocalTransport = fabric.transport(name)
        most = config.max_migrations if config.moves == "live" else 0
        bounds = MigrationBounds(max_outgoing=most, max_incoming=most)
        self.llumlet = Llumlet(
            InstanceId(name),
            role,
            self.wire,
            self,
            bounds=bounds,
            orphan_s=config.orphan_s,
            itl_target_s=itl_target_s,
            on_fatal=on_fatal or self._failed,
        )
        leaving, entering = fabric.leaving, fabric.entering

        def is_copying() -> bool:
            return bool(leaving.get(name) or entering.get(name))

        # A stranded request may leave a prefill instance at any of its tokens.
        policies = config.policies
        by_step = config.every_step or role == "prefill" or policies.roles
        settings = config.engines.get(role) or config.engines["neutral"]
        settings = settings.of_role(role, policies.decode_prompt_tokens)
        self.faults = faults or EngineFaults()
        self.engine = SimulatedEngine(
            settings,
            decode_payload,
            self._publish,
            self.llumlet.events,
            is_copying,
            None if by_step else delivery_s,
            self.faults,
            config.orphan_s,
        )
        fabric.on_change[name] = self.engine.pace_changes
        self.transport.register(self.engine.regions)
        self.llumlet.start(self.engine, self.transport)

    @property
    def info(self) -> InstanceInfo:
        return InstanceInfo(
            instance_id=self.name,
            role=self.role,
            address=self.llumlet.address,
            node=self._node,
            pid=0,
            engine=self.engine.facts,
        )

    async def stop(self) -> None:
        """Ends the instance at once, like the end of its process."""
        self._fabric.on_change.pop(self.name, None)
        await self.engine.stop()
        await self.llumlet.close()
        self.transport.close()
        await self.wire.close()

    def _publish(self, client: str, outputs: list[SimulatedOutput], spans: list[TokenSpan]) -> None:
        self.wire.send_to(client, [TokenHeader(self.name, spans), SimulatedBatch(list(outputs))])

    def report(self, client: str, report: RequestReport) -> None:
        """See `pd_serve.instance.request_reporter.ReportPublisher`."""
        self.wire.send_to(client, [TokenHeader(self.name, [], report), report])

    def retain(self, clients: Collection[str]) -> None:
        """Nothing is kept for a client."""

    def _failed(self, error: BaseException) -> None:
        logger.error("%s has failed", self.name, exc_info=error)
        self.failure = error
