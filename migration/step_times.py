"""How long an engine's steps take, measured while it serves: for deciding where prompts are computed."""

#: Weight of what was measured before, at each new step of the same kind.
_DECODE_DECAY, _PROMPT_DECAY, _TOKEN_DECAY = 0.95, 0.9, 0.99

#: Weight of a step that is shorter than the shortest until now: a single one may be mismeasured.
_SHORTER = 0.1

#: Least share of a step with prompts that counts as time for them.
_LEAST_SHARE = 0.1


class StepTimes:
    """Means over the latest steps.

    A step takes the time of a decode step and a time for each prompt token in it. Both are 0 until a step of
    their kind has been measured.

    Attributes:
        decode_s: Duration of a step without prompts, in seconds.
        prompt_token_s: Time for each prompt token in a step, in seconds.
        token_s: Time for each token of a running request, steps with prompts included.
        least_step_s: Duration of the shortest steps without prompts.
        busy_s: Duration of all steps together.
    """

    def __init__(self) -> None:
        self.decode_s = self.prompt_token_s = self.token_s = self.least_step_s = self.busy_s = 0.0
        self._prompt_s = self._prompt_tokens = 0.0
        self._all_s = self._decode_steps = 0.0

    def add(self, step_s: float, prompt_tokens: int, *, decodes: bool = True) -> None:
        """A step has taken `step_s` seconds, with this many prompt tokens in it.

        Args:
            decodes: Running requests got a token in it.
        """
        self.busy_s += step_s
        self._all_s = _TOKEN_DECAY * self._all_s + step_s
        self._decode_steps = _TOKEN_DECAY * self._decode_steps + decodes
        if decodes:
            self.token_s = self._all_s / self._decode_steps
        if not prompt_tokens:
            least = self.least_step_s or step_s
            self.least_step_s = least + _SHORTER * min(step_s - least, 0.0)
        if not prompt_tokens:
            before = self.decode_s or step_s
            self.decode_s = _DECODE_DECAY * before + (1.0 - _DECODE_DECAY) * step_s
            return
        for_prompts = max(step_s - self.decode_s, _LEAST_SHARE * step_s)
        self._prompt_s = _PROMPT_DECAY * self._prompt_s + for_prompts
        self._prompt_tokens = _PROMPT_DECAY * self._prompt_tokens + prompt_tokens
        self.prompt_token_s = self._prompt_s / self._prompt_tokens
