"""schemathesis: vLLM's OpenAPI document at plain vLLM and at the cluster, and `/cluster` at ours."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.compat_environment import COMPAT, SCRIPTS, needs_environment, output_of
from tests.e2e.completion_client import CompletionClient
from tests.e2e.conftest import Reference
from tests.e2e.server_process import ServerProcess
from tests.e2e.verdicts import Verdicts

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"

#: What schemathesis leaves alone: what changes the engines; and schemas that it takes minutes for.
LEFT_OUT = "elastic_ep|/batch$|^/v1/responses$"


@pytest.fixture
def server(cluster: ServerProcess) -> ServerProcess:
    return cluster


async def fuzz(document: Path, url: str, report: Path, *flags: str) -> None:
    """Runs schemathesis, which writes its report."""
    await output_of(
        *(COMPAT / "bin" / "st", "run", document, "--url", url, *flags),
        *("--generation-deterministic", "--phases", "coverage,fuzzing"),
        *("--continue-on-failure", "--max-failures", "100000", "--no-shrink", "--request-timeout", "120"),
        *("--report", "json", "--report-json-path", report),
        codes=(0, 1),  # 1: something was found
        SCHEMATHESIS_HOOKS="schemathesis_hooks",
        PYTHONPATH=str(SCRIPTS),
    )


def found(report: dict[str, Any]) -> dict[str, Any]:
    """What was found, by operation; and how much was tried."""
    failures: dict[str, Any] = {"operations tested": report["operations"]["tested"]}
    for failure in report["failures"] + report["errors"]:
        for operation in failure.get("operations", ["?"]):
            failures.setdefault(operation, []).append(failure["title"])
    return {name: sorted(what) if isinstance(what, list) else what for name, what in failures.items()}


@needs_environment
@pytest.mark.timeout(1800)
async def test_schemathesis_finds_the_same_as_at_plain_vllm(
    client: CompletionClient, reference: Reference, verdicts: Verdicts, tmp_path: Path
) -> None:
    """Both are asked the same, by vLLM's document."""
    document = tmp_path / "vllm.json"
    async with reference.new_client() as http:
        document.write_text((await http.get("/openapi.json")).text)
    flags = ("--checks", CHECKS, "--max-examples", "5", "--exclude-path-regex", LEFT_OUT)
    reports = [tmp_path / "theirs.json", tmp_path / "found.json"]
    urls = (reference.url, str(client.http.base_url))
    await asyncio.gather(
        *(fuzz(document, url, report, *flags) for url, report in zip(urls, reports, strict=True))
    )
    theirs, ours = [json.loads(report.read_text()) for report in reports]
    verdicts.tried("schemathesis", ours["schemathesis_version"])
    verdicts.compare_all("schemathesis", found(theirs), found(ours))


@needs_environment
@pytest.mark.timeout(900)
async def test_schemathesis_finds_nothing_at_the_cluster_routes(
    client: CompletionClient, tmp_path: Path
) -> None:
    """`/cluster` keeps to its document, and nothing comes of nonsense. `client` asks for its integrity."""
    document = tmp_path / "ours.json"
    document.write_text((await client.http.get("/openapi.json")).text)
    flags = ("--include-path-regex", "^/cluster", "--exclude-path", "/cluster/restart")
    flags += ("--checks", f"{CHECKS},negative_data_rejection", "--max-examples", "50")
    await fuzz(document, str(client.http.base_url), tmp_path / "report.json", *flags)

    report = json.loads((tmp_path / "report.json").read_text())
    assert found(report) == {"operations tested": 7}
    assert report["test_cases"]["generated"] > 100
