"""The arguments of Ray Serve's disaggregated deployment."""

from loadtests.bench.ray_llm_app import engine_arguments, llm_config


def test_only_what_sets_up_an_engine_and_is_not_the_default_is_passed_on() -> None:
    flags = ["--model=/models/tiny", "--served-model-name=tiny", "--host=127.0.0.1", "--port=8123"]
    parsed, engine = engine_arguments(
        [*flags, "--block-size=32", "--enforce-eager", "--disable-uvicorn-access-log"]
    )

    assert engine == {"block_size": 32, "enforce_eager": True}
    assert (parsed.model, parsed.served_model_name) == ("/models/tiny", ["tiny"])
    assert (parsed.host, parsed.port) == ("127.0.0.1", 8123)


def test_an_engine_has_its_role_and_a_cpu_but_no_gpu() -> None:
    config = llm_config("/models/tiny", "tiny", 2, {"block_size": 32}, "kv_consumer")

    assert config["engine_kwargs"] == {
        "block_size": 32,
        "kv_transfer_config": {
            "kv_connector": "NixlConnector",
            "kv_role": "kv_consumer",
            "kv_buffer_device": "cpu",
        },
    }
    assert config["deployment_config"] == {"num_replicas": 2}
    assert config["placement_group_config"] == {"bundles": [{"CPU": 1}]}
