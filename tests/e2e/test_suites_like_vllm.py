"""Other people's clients and test suites find at the cluster what they find at plain vLLM.

All but vLLM's own benchmark live in an environment of their own, which `make compat` makes.
"""

import asyncio
import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from completion_client import CompletionClient
from conftest import Reference
from server_process import ServerProcess
from verdicts import Verdicts
from vllm.benchmarks import serve as vllm_bench
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pd_serve import models

SCRIPTS = Path(__file__).parent / "other_clients"
COMPAT = Path(__file__).parents[2] / ".venv-compat"
CANARY = COMPAT / "node_modules" / "compatcanary"

needs_environment = pytest.mark.skipif(
    not (COMPAT / "bin" / "st").exists(), reason="no .venv-compat: `make compat` makes it"
)
needs_canary = pytest.mark.skipif(
    not CANARY.exists(),
    reason="no compatcanary in .venv-compat: `make compat` puts it there, with node and npm",
)

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"

#: What schemathesis leaves alone: what changes the engines; and schemas that it takes minutes for.
LEFT_OUT = "elastic_ep|/batch$|^/v1/responses$"


@pytest.fixture
def server(cluster: ServerProcess) -> ServerProcess:
    return cluster


async def output_of(*command: str | Path, codes: Sequence[int] = (0,), **environment: str) -> str:
    """What a command prints."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *map(str, command), stdout=pipe, stderr=pipe, env=os.environ | environment
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode in codes, (out + err).decode()[-3000:]
    return out.decode()


async def test_vllm_s_benchmark(client: CompletionClient, reference: Reference, verdicts: Verdicts) -> None:
    """As `vllm bench serve` runs it; one after the other, for it counts by the process."""

    def bench(url: str) -> dict[str, Any]:
        parser = FlexibleArgumentParser()
        vllm_bench.add_cli_args(parser)
        flags = ["--base-url", url, "--model", "tiny", "--tokenizer", models.resolve("tiny")]
        flags += ["--dataset-name", "random", "--random-input-len", "100", "--random-output-len", "20"]
        flags += ["--num-prompts", "8", "--ignore-eos", "--disable-tqdm", "--temperature", "0"]
        args: Namespace = parser.parse_args(flags)
        found = vllm_bench.main(args)
        return {name: found[name] for name in ("completed", "failed", "total_output_tokens")}

    theirs = await asyncio.to_thread(bench, reference.url)
    ours = await asyncio.to_thread(bench, str(client.http.base_url))
    assert ours == {"completed": 8, "failed": 0, "total_output_tokens": 160}
    verdicts.compare_all("vllm bench serve", theirs, ours)


@needs_environment
@pytest.mark.parametrize("name", ["litellm", "langchain"])
async def test_client(client: CompletionClient, reference: Reference, verdicts: Verdicts, name: str) -> None:
    async def session(url: str) -> dict[str, Any]:
        printed = await output_of(COMPAT / "bin" / "python", SCRIPTS / f"{name}_session.py", url)
        return dict(json.loads(printed.splitlines()[-1]))

    theirs, ours = [await session(url) for url in (reference.url, str(client.http.base_url))]
    verdicts.tried(name, ours["version"])
    verdicts.compare_all(name, theirs["verdicts"], ours["verdicts"])


@needs_canary
@pytest.mark.timeout(900)
async def test_compatcanary(client: CompletionClient, reference: Reference, verdicts: Verdicts) -> None:
    async def scan(url: str) -> dict[str, Any]:
        arguments = ("--model", "tiny", "--format", "json", "--fail-on", "never", "--timeout", "300")
        cli = CANARY / "src" / "cli.js"
        return dict(json.loads(await output_of("node", cli, "scan", "--base-url", f"{url}/v1", *arguments)))

    theirs, ours = await asyncio.gather(scan(reference.url), scan(str(client.http.base_url)))
    verdicts.tried("compatcanary", ours["scanner"]["version"])
    status = [{probe["id"]: probe["status"] for probe in report["results"]} for report in (theirs, ours)]
    verdicts.compare_all("compatcanary", *status)


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
async def test_schemathesis(
    client: CompletionClient, reference: Reference, verdicts: Verdicts, tmp_path: Path
) -> None:
    """Both are asked the same, by vLLM's document."""
    document = tmp_path / "vllm.json"
    async with reference.http as http:
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
async def test_schemathesis_on_the_routes_of_ours(client: CompletionClient, tmp_path: Path) -> None:
    """`/cluster` keeps to its document, and nothing comes of nonsense. `client` asks for its integrity."""
    document = tmp_path / "ours.json"
    document.write_text((await client.http.get("/openapi.json")).text)
    flags = ("--include-path-regex", "^/cluster", "--exclude-path", "/cluster/restart")
    flags += ("--checks", f"{CHECKS},negative_data_rejection", "--max-examples", "50")
    await fuzz(document, str(client.http.base_url), tmp_path / "report.json", *flags)

    report = json.loads((tmp_path / "report.json").read_text())
    assert found(report) == {"operations tested": 6}
    assert report["test_cases"]["generated"] > 100
