"""Grammars of structured outputs, each compiled with the backend that the front end has chosen for it."""

from typing import Any

from vllm import envs
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_outlines import OutlinesBackend
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputGrammar

from migration.vllm_engine.outlines_index import compile_index

#: How much of a compiler's reason a client gets, in characters.
MAX_REASON = 500


class Grammars(StructuredOutputManager):
    """vLLM's manager with a compiler for every backend.

    With `backend="auto"` the front end chooses a backend for each request, for what it supports. vLLM's own
    manager compiles all grammars with the one that its first request has: an engine would refuse or ignore
    what another one, whose first request was another, follows.

    Source: vllm/v1/structured_output/__init__.py
    """

    _backends: dict[str | None, StructuredOutputBackend | None]
    _name: str | None  # of the backend of the request that came last

    @classmethod
    def take_over(cls, manager: StructuredOutputManager) -> None:
        """Makes an engine's manager, which has compiled nothing yet, one of these."""
        manager.__class__ = cls
        manager._backends, manager._name = {}, None

    @property
    def backend(self) -> StructuredOutputBackend | None:
        return self._backends.get(self._name)

    @backend.setter
    def backend(self, backend: StructuredOutputBackend | None) -> None:
        self._backends[self._name] = backend

    def grammar_init(self, request: Request) -> None:
        if request.structured_output_request is not None:
            self._name = request.sampling_params.structured_outputs._backend
            if self._name == "outlines" and self.backend is None:
                size = self.vllm_config.model_config.get_vocab_size()
                self.backend = BoundedOutlines(self.vllm_config, self.tokenizer, size)
            super().grammar_init(request)

    def _create_grammar(self, request: Request) -> StructuredOutputGrammar:
        """Compiles a grammar, in a thread.

        Raises:
            Exception: It has no meaning for the compiler, or no token may be the first.
        """
        parameters = request.sampling_params
        backend = self._backend_of(request)
        kind, text = request.structured_output_request.structured_output_key
        grammar = backend.compile_grammar(kind, text, stop_token_ids=parameters.all_stop_token_ids)
        if (why := _dead_end(backend, grammar)) is not None:
            raise ValueError(why)
        return grammar

    def _backend_of(self, request: Request) -> StructuredOutputBackend:
        return self._backends[request.sampling_params.structured_outputs._backend]

    def accept_tokens(self, request: Request, new_token_ids: list[int]) -> bool:
        """Advances a request's grammar. Returns False, and the request ends with an error, if it cannot.

        Where a grammar allows no token, the sampler takes any.
        """
        if super().accept_tokens(request, new_token_ids):
            return True
        structured = request.structured_output_request
        if (why := _dead_end(self._backend_of(request), structured.grammar)) is not None:
            number = request.num_output_tokens - len(new_token_ids)
            structured.grammar = ValueError(f"at output token {number + 1}: {why}")
        return False


class BoundedOutlines(OutlinesBackend):
    """vLLM's backend, whose compilations end when they take too long."""

    def _compile_index(self, regex_string: str, vocabulary: Any) -> Any:
        """Source: vllm/v1/structured_output/backend_outlines.py"""
        key = f"{vocabulary._hash}_{regex_string}"
        if key not in self.cache:
            seconds = envs.VLLM_REGEX_COMPILATION_TIMEOUT_S
            self.cache[key] = compile_index(regex_string, vocabulary.inner, seconds)
        return self.cache[key]


def _dead_end(backend: StructuredOutputBackend, grammar: StructuredOutputGrammar) -> str | None:
    """Why neither a token nor the end may come next; None if one may."""
    allowed = backend.allocate_token_bitmask(1)
    grammar.fill_bitmask(allowed, 0)
    # llguidance keeps its error, also of this mask, and allows the end then.
    if (matcher := getattr(grammar, "ll_matcher", None)) is not None and (error := matcher.get_error()):
        return str(error).partition("\n<state>")[0]
    return None if allowed.any() else "it allows neither a token nor the end"


def refusal(request: Request) -> str | None:
    """Why no engine can serve a request whose structured output has ended it; None if that has not."""
    structured = request.structured_output_request
    if structured is None or not isinstance(error := structured.grammar, Exception):
        return None
    return f"The structured output cannot be followed: {(str(error) or type(error).__name__)[:MAX_REASON]}"
