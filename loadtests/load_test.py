"""One load test in greenlets: a warm-up, then every planned request at its time (open loop)."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gevent
from gevent.pool import Group, Pool

from loadtests import checks
from loadtests.answer import StreamedAnswer, StreamError
from loadtests.client import StreamingClient
from loadtests.options import LoadOptions
from loadtests.outcome import Outcome, as_row, outcome
from loadtests.served_model import ServedModel
from loadtests.workload import PlannedRequest, fitting

logger = logging.getLogger(__name__)

#: Lengths of the warm-up requests: enough to infer a vocabulary; see `loadtests.checks`.
WARM_UP_PROMPT_TOKENS, WARM_UP_TOKENS = 48, 64

#: Concurrent requests when they are repeated after the load.
REPEAT_CONCURRENCY = 4

#: Greatest number of log lines for each kind of failure.
MAX_LOGGED_PER_KIND = 3


@dataclass(slots=True)
class LoadTest:
    """One load test, to be run once.

    Attributes:
        planned: The requests; those that the model's context cannot hold are left out at the start.
        on_outcome: Called with the outcome of each request.
        outcomes: In the order in which the requests ended.
        check: One of `CHECKS`, chosen in the warm-up if the option is "auto".
        began_at: Start of the load, in seconds since the epoch.
        left_out: Number of requests that the model's context cannot hold.
    """

    client: StreamingClient
    options: LoadOptions
    planned: list[PlannedRequest]
    on_outcome: Callable[[Outcome], None]
    outcomes: list[Outcome] = field(default_factory=list)
    check: str = ""
    began_at: float = 0.0
    left_out: int = 0
    _model: ServedModel = field(init=False)
    _vocabulary: checks.Vocabulary | None = None
    _to_repeat: list[tuple[PlannedRequest, StreamedAnswer, Outcome]] = field(default_factory=list)
    _users: Group = field(default_factory=Group)

    def run(self) -> None:
        """Returns when all requests have ended.

        Raises:
            StreamError: The load could not begin: no answer from the service, or none that `--check` accepts.
        """
        self._model = ServedModel.ask(self.client, self.options.model, self.options.seed)
        self._leave_out()
        self._warm_up()
        logger.info(
            "load: %d requests in %.0f s to model %s; check: %s",
            len(self.planned),
            self.planned[-1].at_s,
            self._model.name,
            self.check,
        )
        try:
            self._replay()
        finally:
            self._users.kill()
        self._repeat_all()

    # ---- before the load

    def _leave_out(self) -> None:
        planned = fitting(self.planned, self._model.max_tokens)
        self.left_out = len(self.planned) - len(planned)
        if self.left_out:
            logger.warning(
                "%d requests exceed the model's %d tokens and are left out; see --max-prompt-tokens",
                self.left_out,
                self._model.max_tokens,
            )
        if not planned:
            raise StreamError("no request fits the model")
        self.planned = planned

    def _warm_up(self) -> None:
        wanted = self.options.check
        for number in range(max(self.options.warm_up, 1)):
            api = ("completions", "chat")[number % 2] if self.options.api == "both" else self.options.api
            prompt_tokens = min(WARM_UP_PROMPT_TOKENS, self._model.max_tokens // 4)
            tokens = min(WARM_UP_TOKENS, self._model.max_tokens // 2)
            request = PlannedRequest(-1 - number, 0.0, api, prompt_tokens, tokens)
            answer = StreamedAnswer()
            self.client.stream(api, json.dumps(self._model.body(request)), {}, answer)
            if not number and wanted in ("auto", "simulated"):
                self._vocabulary = checks.simulated_vocabulary(answer)
                if self._vocabulary is None and wanted == "simulated":
                    raise StreamError("the answer is not one of a simulated engine", answer.text[:60])
            if not number:
                self.check = self._chosen_check(wanted)
            self._check(request, answer)

    def _chosen_check(self, wanted: str) -> str:
        if wanted != "auto":
            return wanted
        if self._vocabulary is not None:
            return "simulated"
        return "repeat" if self._model.name == "tiny" else "count"

    # ---- the load

    def _replay(self) -> None:
        """Open loop: one greenlet starts each user at the planned time, without waiting for the others."""
        payload = self._payload(self.planned[0])
        self.began_at, zero = time.time(), time.perf_counter()
        for number, request in enumerate(self.planned):
            start = zero + request.at_s
            gevent.sleep(max(0.0, start - time.perf_counter()))
            self._users.spawn(self._send, request, payload, start)
            if number + 1 < len(self.planned):
                gevent.sleep(0)  # send this request before the next body is encoded
                payload = self._payload(self.planned[number + 1])
        self._users.join()

    def _payload(self, request: PlannedRequest) -> str:
        return json.dumps(self._model.body(request))

    def _send(self, request: PlannedRequest, payload: str, start_s: float) -> None:
        answer, began, error = StreamedAnswer(), time.perf_counter(), None
        headers = {"X-Request-Id": f"load-{int(self.began_at)}-{request.number}"}
        try:
            self.client.stream(request.api, payload, headers, answer)
            ended = time.perf_counter()
            self._check(request, answer)
        except StreamError as failure:
            ended, error = time.perf_counter(), failure
        result = outcome(request, answer, start_s, began, ended, error)
        if self.check == "repeat" and error is None:
            self._to_repeat.append((request, answer, result))
        self._end(result)

    def _check(self, request: PlannedRequest, answer: StreamedAnswer) -> None:
        checks.check_whole(answer)
        if self._vocabulary is not None:
            checks.check_simulated(answer, self._vocabulary, request.output_tokens)
        checks.check_counts(answer, request)

    def _end(self, result: Outcome) -> None:
        self.outcomes.append(result)
        self.on_outcome(result)
        if result.error is not None:
            same = sum(one.error == result.error for one in self.outcomes)
            if same <= MAX_LOGGED_PER_KIND:
                logger.error(
                    "request %d (%s): %s: %s", result.number, result.api, result.error, result.detail
                )

    # ---- after the load

    def _repeat_all(self) -> None:
        """Sends all requests again: greedy answers are the same each time, so a difference is a fault."""
        if not self._to_repeat:
            return
        logger.info("sending all %d requests again to compare their answers", len(self._to_repeat))
        for done, _ in enumerate(Pool(REPEAT_CONCURRENCY).imap_unordered(self._compare, self._to_repeat), 1):
            if not done % 50:
                logger.info("compared %d of %d", done, len(self._to_repeat))

    def _compare(self, original: tuple[PlannedRequest, StreamedAnswer, Outcome]) -> None:
        request, answer, result = original
        again = StreamedAnswer()
        try:
            self.client.stream(request.api, self._payload(request), {}, again)
            checks.check_same(answer.token_ids, again.token_ids)
            checks.check_text(answer.text, again.text)
        except StreamError as failure:
            result.error, result.detail = failure.kind, failure.detail
            logger.error("request %d: sent again: %s: %s", request.number, failure.kind, failure.detail)


def report(test: LoadTest, summary: dict[str, Any]) -> dict[str, Any]:
    """The content of the `--report` file, without command and machine."""
    return {
        "began_at": test.began_at,
        "check": test.check,
        "left_out": test.left_out,
        "summary": summary,
        "requests": [as_row(one) for one in sorted(test.outcomes, key=lambda one: one.number)],
    }
