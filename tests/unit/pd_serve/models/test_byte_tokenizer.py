"""The tokenizer of random models: one token a byte, and text comes back."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from pd_serve.models import resolve


def read_json(directory: str, name: str) -> dict[str, object]:
    return json.loads((Path(directory) / name).read_text())


def test_tokens_are_bytes_and_text_comes_back() -> None:
    tokenizer = Tokenizer.from_file(f"{resolve('tiny')}/tokenizer.json")
    text = " Straße,\n\t5 €  🎉 <b>"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(list(range(256)), skip_special_tokens=False)


def test_vocabulary_covers_every_row_of_the_model() -> None:
    directory = resolve("tiny")
    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    assert tokenizer.get_vocab_size() == read_json(directory, "config.json")["vocab_size"]
    assert tokenizer.token_to_id("<|eos|>") == read_json(directory, "generation_config.json")["eos_token_id"]


def test_chat_template_renders_to_special_tokens() -> None:
    from jinja2 import Template

    directory = resolve("tiny")
    template = Template(str(read_json(directory, "tokenizer_config.json")["chat_template"]))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = template.render(messages=messages, add_generation_prompt=True)
    assert prompt == "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    ids = Tokenizer.from_file(f"{directory}/tokenizer.json").encode(prompt).ids
    assert [token_id for token_id in ids if token_id >= 256] == [256, 259, 263, 260, 263, 261]
