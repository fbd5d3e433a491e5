"""Commands and configuration of the service under Ray Serve."""

import json
from pathlib import Path

from loadtests.ray_serve_service import ROOT, head_command, new_environment, node_command, write_config
from pd_serve.launch.ray_serve import serve_config


def test_the_configuration_names_the_application(tmp_path: Path) -> None:
    arguments = {"model": "tiny", "engine": "simulated", "decode_resources": json.dumps({"node_b": 1})}

    path = write_config(tmp_path, 8123, arguments, "deploy.app:build", haproxy=False)

    config = json.loads(path.read_text())
    (application,) = config["applications"]
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8123}
    assert application["import_path"] == "deploy.app:build"
    assert serve_config(application["args"]).resources["decode"] == {"node_b": 1.0}
    assert config["controller_options"]["runtime_env"]["env_vars"] == {"RAY_SERVE_ENABLE_HA_PROXY": "0"}


def test_nodes_are_on_loopback_and_end_with_their_process(tmp_path: Path) -> None:
    head = head_command(tmp_path, 6001, 6002)
    node = node_command(6001, {"node_b": 10})

    assert {"--head", "--block", "--port=6001", "--dashboard-port=6002", f"--temp-dir={tmp_path}"} <= set(
        head
    )
    assert {"--block", "--address=127.0.0.1:6001", '--resources={"node_b": 10}'} <= set(node)
    assert "--node-ip-address=127.0.0.1" in head
    assert "--node-ip-address=127.0.0.1" in node


def test_every_cluster_has_a_token_of_its_own_and_finds_this_checkout() -> None:
    first, second = new_environment(), new_environment()

    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert (ROOT / "deploy" / "app.py").exists()
    assert first["PYTHONPATH"] == str(ROOT)
