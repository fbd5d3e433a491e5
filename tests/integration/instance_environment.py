"""The environment of an instance's process, for tests that run engines in their own."""

import contextlib
import gc
from collections.abc import Iterator

import pytest

from pd_serve.models import resolve
from pd_serve.platform.environment import engine_environment


@contextlib.contextmanager
def instance_environment() -> Iterator[None]:
    """What every instance's process is started with; to be set before the engine module imports vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment(1, resolve("tiny")).items():
            patch.setenv(name, value)
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        yield
    import vllm.envs

    vllm.envs.disable_envs_cache()  # an engine freezes what it has read
    gc.unfreeze()
    gc.collect()
