"""deploy/: what Ray Serve is given is what Ray Serve takes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve import Application
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from pd_serve.errors import InvalidRequestError
from pd_serve.launch.ray_serve import REQUEST_ID_FLAG, Arguments, build


@pytest.fixture(autouse=True)
def _environment_of_the_process_stays() -> Iterator[None]:
    """Building sets what vLLM is to find in it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


YAML = Path(__file__).parents[3] / "deploy" / "serve.yaml"


def test_the_file_is_in_serves_schema_and_its_arguments_are_ours() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(YAML.read_text(encoding="utf-8")))
    (application,) = config.applications
    module, name = application.import_path.split(":")
    assert (module, name) == (build.__module__, build.__name__)
    arguments = Arguments.model_validate(application.args)
    assert arguments.api_servers > 1
    assert arguments.config().instances == {"prefill": 1, "decode": 2, "neutral": 0}
    assert config.http_options.host == "127.0.0.1"


def test_what_is_built_is_in_serves_schema() -> None:
    args = {"model": "tiny", "prefill": "1", "decode": "2", "api_servers": "3"}  # as `serve run` gives them
    application = build(Arguments.model_validate(args))
    assert isinstance(application, Application)
    deployment: Any = application._bound_deployment
    assert (deployment.name, deployment.num_replicas) == ("ApiServer", 3)
    schema = {
        "import_path": "pd_serve.launch.ray_serve:build",
        "args": args,
        "deployments": [{"name": deployment.name}],
    }
    ServeApplicationSchema.model_validate(schema)


def test_flags_are_those_of_the_command_line() -> None:
    args = Arguments(
        model="tiny",
        autoscale_decode="1:3",
        set="scale_interval_s=1 drain_after_s=2",
        flags="--max-model-len 512 --served-model-name 'a b'",
        decode_resources='{"node_b": 1}',
    )
    config = args.config()
    assert config.autoscale == {"decode": (1, 3)}
    assert (config.policies.scale_interval_s, config.policies.drain_after_s) == (1, 2)
    assert config.engine_flags[1:] == ["--max-model-len", "512", "--served-model-name", "a b"]
    assert config.engine_flags[0] == REQUEST_ID_FLAG
    assert config.resources == {"decode": {"node_b": 1}}


@pytest.mark.parametrize(
    ("args", "error", "says"),
    [
        ({"prefil": 1}, ValidationError, "prefil"),
        ({"prefill": "many"}, ValidationError, "prefill"),
        ({"prefill": 1, "decode": 0}, InvalidRequestError, "prefill instances need decode instances"),
        ({"prefill_resources": "node_a"}, InvalidRequestError, "--prefill-resources takes JSON"),
        ({"decode_resources": '{"GPU": 1}'}, InvalidRequestError, "GPU has to be a custom resource"),
        ({"flags": "--max-modl-len 5"}, InvalidRequestError, "did you mean --max-model-len"),
    ],
)
def test_what_is_wrong_is_said(args: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build(Arguments.model_validate({"model": "tiny", **args}))
