"""Which test file belongs to which module. `test_architecture` checks it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("router", "migration", "pd_serve", "loadtests")

#: Records, interfaces and settings: what code they have derives one field from others.
RECORDS = {
    "migration/messages.py",
    "migration/record.py",
    "pd_serve/comm/requests.py",
    "pd_serve/errors.py",
    "pd_serve/manager/manager_config.py",
    "pd_serve/simulation/config.py",
    "pd_serve/simulation/faults/schedule.py",
    "pd_serve/simulation/result.py",
    "router/settings.py",
}

#: Modules that are tested through another one, by the test file that runs them.
TESTED_THROUGH: dict[str, tuple[str, ...]] = {
    # Both sides of the protocol, which only make sense together.
    "tests/unit/migration/test_coordinator.py": ("migration/incoming.py", "migration/outgoing.py"),
    "tests/unit/migration/test_prefix_copies.py": (
        "migration/prefix_holder.py",
        "migration/prefix_reader.py",
    ),
    "tests/unit/migration/transport/test_head_slices.py": ("migration/transport/kv_transport.py",),
    "tests/unit/migration/transport/test_nixl_reader.py": ("migration/transport/nixl_connections.py",),
    "tests/unit/migration/transport/test_worker_transport.py": tuple(
        f"migration/transport/{name}.py" for name in ("read_caller", "worker_messages", "worker_server")
    ),
    # Parts of a vLLM engine that need one that runs.
    "tests/integration/test_vllm_engine_adapter.py": tuple(
        f"migration/vllm_engine/{name}.py"
        for name in [
            "compatibility",
            "core_builder",
            "cpu_worker",
            "executor",
            "live_requests",
            "request_loader",
            "step_loop",
            "worker",
        ]
    ),
    "tests/integration/test_migrating_scheduler.py": (
        "migration/vllm_engine/migrated_blocks.py",
        "migration/vllm_engine/scheduler_integrity.py",
    ),
    "tests/integration/test_prefix_store.py": ("migration/vllm_engine/prefix_blocks.py",),
    "tests/integration/test_cached_keys.py": ("pd_serve/api/prefix_keys.py",),
    "tests/integration/test_profiling_engine_profile.py": ("pd_serve/profiling/measured_engine.py",),
    "tests/integration/test_vllm_engine_lora.py": ("migration/vllm_engine/lora_adapters.py",),
    "tests/integration/test_api_lora.py": ("pd_serve/api/lora_adapters.py",),
    # Parts of the HTTP application, which are tested by requests to it.
    "tests/integration/test_api_app.py": tuple(
        f"pd_serve/api/{name}.py" for name in ("cluster_routes", "engine_client", "identity", "server")
    ),
    "tests/integration/test_api_http_limits.py": ("pd_serve/api/body_limit.py",),
    "tests/unit/pd_serve/models/test_random_model.py": (
        "pd_serve/models/kinds.py",
        "pd_serve/models/random_weights.py",
    ),
    # Parts of one loop or of one output.
    "tests/unit/pd_serve/planning/test_fast_cluster.py": ("pd_serve/planning/fast_instance.py",),
    "tests/unit/pd_serve/cli/test_simulate.py": ("pd_serve/cli/simulate_output.py",),
    "tests/unit/pd_serve/launch/test_engine_flags.py": ("pd_serve/launch/vllm_parser.py",),
    "tests/unit/pd_serve/observe/test_recorder.py": ("pd_serve/observe/timeline.py",),
    "tests/unit/pd_serve/instance/test_load_reporter.py": ("pd_serve/observe/process_stats.py",),
    "tests/unit/pd_serve/simulated_engine/test_simulated_engine.py": tuple(
        f"pd_serve/simulated_engine/{name}.py" for name in ("batcher", "migrations", "outputs", "sequence")
    ),
    "tests/unit/pd_serve/simulation/test_simulate.py": tuple(
        f"pd_serve/simulation/simulated_{name}.py" for name in ("instance", "launcher")
    ),
    "tests/unit/pd_serve/simulation/faults/test_run.py": tuple(
        f"pd_serve/simulation/faults/{name}.py"
        for name in [
            "clients",
            "cluster",
            "effects",
            "injector",
            "logs",
            "operations",
            "platform",
            "rest",
            "targets",
        ]
    ),
    "tests/unit/loadtests/experiments/test_figure_files.py": ("loadtests/experiments/tables.py",),
    "tests/unit/loadtests/experiments/paper/test_figures.py": tuple(
        f"loadtests/experiments/paper/{name}.py"
        for name in [
            "all_figures",
            "autoscaling",
            "fragmentation",
            "migration",
            "priorities",
            "scheduling",
            "serving",
            "setup",
            "single_migration",
        ]
    ),
    "tests/unit/loadtests/report/test_page.py": ("loadtests/report/plots.py",),
    "tests/unit/loadtests/chaos/test_report.py": ("loadtests/chaos/timeline.py",),
    "tests/e2e/test_faults.py": (
        "loadtests/chaos/__main__.py",
        "loadtests/chaos/campaign.py",
        "loadtests/cluster_run.py",
        "loadtests/fuzz/__main__.py",
        "loadtests/fuzz/campaign.py",
        "loadtests/soak/__main__.py",
        "loadtests/soak/campaign.py",
        "loadtests/started_service.py",
    ),
    "tests/unit/loadtests/bench/test_report.py": ("loadtests/terminal.py",),
    "tests/unit/pd_serve/platform/test_fork_server.py": ("pd_serve/platform/fork_client.py",),
    # Parts that only processes of their own run.
    "tests/integration/test_locust_process.py": (
        "loadtests/client.py",
        "loadtests/load_test.py",
        "loadtests/locustfile.py",
    ),
    "tests/e2e/test_command_line.py": (
        "pd_serve/launch/api_server.py",
        "pd_serve/launch/local_cluster.py",
        "pd_serve/launch/serve.py",
    ),
    "tests/e2e/test_api_servers.py": ("pd_serve/launch/api_server_process.py",),
    "tests/unit/deploy/test_serve_application.py": ("pd_serve/launch/ray_serve.py",),
    "tests/e2e/test_dashboard_page.py": ("loadtests/browser.py",),
}

#: Commands that write results kept in the repository; a person runs and reads them.
RUN_BY_HAND = {
    "loadtests/__main__.py",
    "loadtests/bench/__main__.py",
    "loadtests/bench/in_process.py",
    "loadtests/bench/kinds.py",
    "loadtests/bench/migration.py",
    "loadtests/dashboard_figure.py",
}

EXCEPTIONS = RECORDS | RUN_BY_HAND | {file for files in TESTED_THROUGH.values() for file in files}


def has_code(source: str) -> bool:
    """Whether a function or method has a body besides its docstring."""
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not all(isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) for line in node.body)
        for node in ast.walk(ast.parse(source))
    )


def mirrors(file: Path) -> list[Path]:
    """The test files that a module may have. The folder of integration tests is flat."""
    name = file.stem.strip("_")
    return [
        Path("tests/unit") / file.parent / f"test_{name}.py",
        Path("tests/integration") / f"test_{name}.py",
        Path("tests/integration") / f"test_{file.parent.name}_{name}.py",
    ]


def without_test_file() -> set[str]:
    """Modules with code and without a test file of their name."""
    files = [
        path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
    ]
    return {
        file.as_posix()
        for file in files
        if has_code((ROOT / file).read_text(encoding="utf-8"))
        and not any((ROOT / mirror).exists() for mirror in mirrors(file))
    }
