"""Encodes and sends outputs beside the engine's steps, as vLLM's own output thread does."""

import logging
import queue
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from migration.token_span import TokenSpan
from pd_serve.comm.messages import RequestReport
from pd_serve.instance.token_publisher import TokenPublisher

logger = logging.getLogger(__name__)

#: Maximum time that `close` waits for what is left to be sent, in seconds.
CLOSE_S = 2.0


class OutputThread:
    """A `TokenPublisher` behind a queue: its thread sends in the order of the calls, which do not wait.

    What the calls are given must not be changed afterwards.

    Args:
        publisher: Belongs to the thread from now on.
        encode: Makes frames of a step's outputs.
        on_failure: Called in the thread when something could not be encoded or sent. Nothing is sent any more
            then, so it has to end the process.
    """

    def __init__(
        self,
        publisher: TokenPublisher,
        encode: Callable[[Any], Sequence[Any]],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._publisher = publisher
        self._encode = encode
        self._on_failure = on_failure
        self._calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outputs", daemon=True)
        self._thread.start()

    def publish(self, client: str, outputs: Any, spans: list[TokenSpan]) -> None:
        """Encodes a step's outputs and sends them to the token endpoint `client`."""
        self._calls.put((self._encode_and_publish, (client, outputs, spans)))

    def report(self, client: str, report: RequestReport) -> None:
        """Sends a report to the token endpoint `client`, after all outputs before it."""
        self._calls.put((self._publisher.report, (client, report)))

    def retain(self, clients: Collection[str]) -> None:
        """Closes the sockets, with their queues, to all other clients; after all calls before it."""
        self._calls.put((self._publisher.retain, (clients,)))

    def close(self) -> None:
        """Sends what is left and closes the sockets. Idempotent. Call it before the wire is closed."""
        self._calls.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.error("outputs are not sent: the thread that sends them hangs")
        else:
            self._publisher.close()

    # ---- the thread

    def _run(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                function, arguments = call
                function(*arguments)
        except BaseException as error:
            logger.exception("outputs could not be sent")
            self._on_failure(error)

    def _encode_and_publish(self, client: str, outputs: Any, spans: list[TokenSpan]) -> None:
        self._publisher.publish(client, self._encode(outputs), spans)
