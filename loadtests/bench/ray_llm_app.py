"""Ray Serve's own disaggregated deployment: `python -m loadtests.bench.ray_llm_app --decode N FLAGS`.

FLAGS are those of vLLM's server; one prefill engine and N decode engines get them. Ray pins another release
of vLLM than the one here, with which this was tried.

Source: https://docs.ray.io/en/latest/serve/llm/user-guides/prefill-decode.html
"""

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

#: Processes of Ray Serve beside the engines, in CPUs that Ray counts.
OTHER_PROCESSES = 4


def engine_arguments(flags: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """vLLM's parsed flags, and those of them that set up an engine and are not the default."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    parsed, defaults = parser.parse_args(list(flags)), vars(parser.parse_args([]))
    names = AsyncEngineArgs.__dataclass_fields__.keys() & vars(parsed).keys()
    changed = {name: getattr(parsed, name) for name in sorted(names)}
    left_out = ("model", "served_model_name")
    return parsed, {k: v for k, v in changed.items() if v != defaults[k] and k not in left_out}


def llm_config(
    model: str, name: str, replicas: int, engine: Mapping[str, Any], kv_role: str
) -> dict[str, Any]:
    """The arguments of an `LLMConfig`, on CPUs."""
    transfer = {"kv_connector": "NixlConnector", "kv_role": kv_role, "kv_buffer_device": "cpu"}
    return {
        "model_loading_config": {"model_id": name, "model_source": model},
        "deployment_config": {"num_replicas": replicas},
        "placement_group_config": {"bundles": [{"CPU": 1}]},
        "engine_kwargs": dict(engine) | {"kv_transfer_config": transfer},
    }


def main() -> None:
    """Serves until SIGTERM."""
    own = argparse.ArgumentParser()
    own.add_argument("--decode", type=int, default=1)
    options, flags = own.parse_known_args()
    parsed, engine = engine_arguments(flags)

    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_pd_openai_app

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ray.init(address="local", num_cpus=2 * (options.decode + 1) + OTHER_PROCESSES, include_dashboard=False)
    try:
        (name,) = parsed.served_model_name
        configs = {
            f"{role}_config": LLMConfig(**llm_config(parsed.model, name, number, engine, kv_role))
            for role, number, kv_role in (
                ("prefill", 1, "kv_producer"),
                ("decode", options.decode, "kv_consumer"),
            )
        }
        serve.start(http_options={"host": parsed.host, "port": parsed.port})
        serve.run(build_pd_openai_app(configs), blocking=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
