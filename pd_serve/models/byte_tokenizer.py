"""The tokenizer of the random models: one token per byte, id = byte value, then the special tokens."""

import json
from pathlib import Path

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
)
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "<|bos|>{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] or '') + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _logit_bias(token_id: int) -> float:
    """How likely a token is made, in standard deviations of a logit."""
    if token_id == EOS_ID:
        return -5.0
    if token_id >= 256 or not (0x20 <= token_id < 0x7F or token_id == 0x0A):
        return -20.0
    char = chr(token_id)
    if char.islower():
        return 0.0
    return 1.5 if char in ' "' else -2.5


LOGIT_BIAS = tuple(_logit_bias(token_id) for token_id in range(VOCAB_SIZE))


def write(directory: Path, max_context_tokens: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `directory`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: byte for byte, char in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_context_tokens,
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _byte_characters() -> list[str]:
    """The 256 characters that stand for the bytes in byte-level BPE, in byte order.

    Source: GPT-2's `bytes_to_unicode`: a printable byte stands for itself, the others follow from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
