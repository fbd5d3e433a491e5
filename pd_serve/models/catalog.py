"""Names of models: the demo and test models, which are built here, and all that vLLM accepts."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pd_serve.errors import InvalidRequestError
from pd_serve.models import random_model, smollm2, tiny
from pd_serve.models.cache import cached_directory
from pd_serve.models.kinds import KINDS

DEFAULT_MODEL = "smollm2"


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model that needs no download from a hub. `recipe` is part of its directory's name."""

    served_name: str
    recipe: str
    build: Callable[[Path], None]
    dtype: str | None = None


_DEMO_MODELS = {
    "tiny": BuiltModel("tiny", tiny.TINY.recipe, partial(tiny.build, tiny.TINY), "float32"),
    "bench": BuiltModel("bench", tiny.BENCH.recipe, partial(tiny.build, tiny.BENCH), "float32"),
    # With its quantized weights the first words of an answer are nearly tied: bfloat16 would change them.
    "smollm2": BuiltModel("SmolLM2-135M-Instruct", smollm2.RECIPE, smollm2.build, "float32"),
}
#: One of every kind of engine. They are for tests of migration, and no message offers them.
_TEST_MODELS = {
    name: BuiltModel(name, random_model.recipe(kind), partial(random_model.build, kind), kind.dtype)
    for name, kind in KINDS.items()
}
_MODELS = _DEMO_MODELS | _TEST_MODELS
_ALIASES = {"smollm2-135m-instruct": "smollm2"}


def resolve(name: str) -> str:
    """The model that vLLM loads for `name`; a demo or test model is built on first use.

    Its name becomes its local directory. Another name is returned unchanged, a path with `~` expanded:
    vLLM loads local directories and hub names.

    Raises:
        InvalidRequestError: `name` is a path that does not exist, or a model cannot be built here.
    """
    key = _key(name)
    if key is not None:
        model = _MODELS[key]
        return str(cached_directory(f"{key}-r{model.recipe}", model.build))
    path = Path(name).expanduser()
    if name and path.exists():
        return str(path) if name.startswith("~") else name
    if not name or _is_path(name):
        raise InvalidRequestError(
            f"model {name!r} does not exist: give a directory with a config.json, a hub name such as "
            f"org/model, or one of {', '.join(demo_names())}"
        )
    return name


def served_name(name: str) -> str:
    """The default name of the model `name` in the API: vLLM's rule, or a short one if it is built here."""
    key = _key(name)
    return name if key is None else _MODELS[key].served_name


def default_dtype(name: str) -> str | None:
    """The default of `--dtype` for the model `name`; None leaves it to vLLM.

    vLLM's own default runs float32 models in bfloat16 (Source: `vllm/config/model.py`, `_resolve_auto_dtype`)
    and its rounding would let the greedy text of the random models depend on the batch.
    """
    key = _key(name)
    return None if key is None else _MODELS[key].dtype


def demo_names() -> list[str]:
    """The names of the demo models."""
    return sorted(_DEMO_MODELS)


def _key(name: str) -> str | None:
    key = name.lower()
    key = _ALIASES.get(key, key)
    return key if key in _MODELS else None


def _is_path(name: str) -> bool:
    """Whether `name` can only be a path. One separator inside (`org/model`) may be a hub name as well."""
    return name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or name.count(os.sep) > 1
