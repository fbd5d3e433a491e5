"""Other people's clients and test suites find at the cluster what they find at plain vLLM.

All but vLLM's own benchmark live in an environment of their own, which `make compat` makes.
"""

import asyncio
import json
from argparse import Namespace
from typing import Any

import pytest
from vllm.benchmarks import serve as vllm_bench
from vllm.utils.argparse_utils import FlexibleArgumentParser

from pd_serve import models
from tests.e2e.compat_environment import COMPAT, SCRIPTS, needs_environment, output_of
from tests.e2e.completion_client import CompletionClient
from tests.e2e.conftest import Reference
from tests.e2e.server_process import ServerProcess
from tests.e2e.verdicts import Verdicts

CANARY = COMPAT / "node_modules" / "compatcanary"

needs_canary = pytest.mark.skipif(
    not CANARY.exists(),
    reason="no compatcanary in .venv-compat: `make compat` puts it there, with node and npm",
)


@pytest.fixture
def server(cluster: ServerProcess) -> ServerProcess:
    return cluster


async def test_vllm_bench_serve_counts_the_same_as_at_plain_vllm(
    client: CompletionClient, reference: Reference, verdicts: Verdicts
) -> None:
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
async def test_a_client_library_finds_the_same_as_at_plain_vllm(
    client: CompletionClient, reference: Reference, verdicts: Verdicts, name: str
) -> None:
    async def session(url: str) -> dict[str, Any]:
        printed = await output_of(COMPAT / "bin" / "python", SCRIPTS / f"{name}_session.py", url)
        return dict(json.loads(printed.splitlines()[-1]))

    theirs, ours = [await session(url) for url in (reference.url, str(client.http.base_url))]
    verdicts.tried(name, ours["version"])
    verdicts.compare_all(name, theirs["verdicts"], ours["verdicts"])


@needs_canary
@pytest.mark.timeout(900)
async def test_compatcanary_finds_the_same_as_at_plain_vllm(
    client: CompletionClient, reference: Reference, verdicts: Verdicts
) -> None:
    async def scan(url: str) -> dict[str, Any]:
        arguments = ("--model", "tiny", "--format", "json", "--fail-on", "never", "--timeout", "300")
        cli = CANARY / "src" / "cli.js"
        return dict(json.loads(await output_of("node", cli, "scan", "--base-url", f"{url}/v1", *arguments)))

    theirs, ours = await asyncio.gather(scan(reference.url), scan(str(client.http.base_url)))
    verdicts.tried("compatcanary", ours["scanner"]["version"])
    status = [{probe["id"]: probe["status"] for probe in report["results"]} for report in (theirs, ours)]
    verdicts.compare_all("compatcanary", *status)
