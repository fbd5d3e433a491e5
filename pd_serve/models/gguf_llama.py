"""Turn a GGUF file of a Llama with a GPT-2 style tokenizer into the directory that vLLM loads."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor
    from rich.console import Console

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CONTROL_TOKEN = 3
"""`gguf.TokenType.CONTROL`: a special token, never made from text by the merges."""


def convert(source: Path, directory: Path, console: "Console") -> None:
    """Write config, weights (bfloat16) and tokenizer of the GGUF file `source` into `directory`."""
    from gguf import GGUFReader
    from rich.progress import track
    from safetensors.torch import save_file

    reader = GGUFReader(source)
    config = _config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    hidden = not console.is_terminal
    weights = {
        _tensor_name(tensor.name): _dequantized(tensor, heads.get(tensor.name.split(".")[-2]))
        for tensor in track(reader.tensors, "Weights", console=console, transient=True, disable=hidden)
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "generation_config.json", ends)
    _write_tokenizer(reader, directory, config)


def _config(reader: "GGUFReader") -> dict[str, Any]:
    hidden = _field(reader, "llama.embedding_length")
    heads = _field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": _field(reader, "llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": _field(reader, "llama.context_length"),
        # Stored as float32: 9.99999974e-06 is the 1e-05 of the original.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _tensor_name(name: str) -> str:
    whole_model = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in whole_model:
        return whole_model[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{_MODULES[module]}.{kind}"


def _dequantized(tensor: "ReaderTensor", num_heads: int | None) -> "torch.Tensor":
    """The tensor in bfloat16, rows in Hugging Face order.

    llama.cpp rotates neighbouring pairs of a head's dimensions, Hugging Face its two halves, so query and key
    rows were interleaved within each of `num_heads` heads. Source: llama.cpp `LlamaModel.permute`.
    """
    import torch
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type)
    if num_heads is not None:
        rows, columns = values.shape
        pairs = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
        values = pairs.swapaxes(1, 2).reshape(rows, columns)
    return torch.tensor(values).to(torch.bfloat16)


def _write_tokenizer(reader: "GGUFReader", directory: Path, config: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # Source: llama.cpp, pre-tokenizer "smollm": single digits, then GPT-2's pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
            "pad_token": tokens[config["pad_token_id"]],
            "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
            "additional_special_tokens": special,
            "clean_up_tokenization_spaces": False,
            "chat_template": _field(reader, "tokenizer.chat_template"),
        },
    )


def _field(reader: "GGUFReader", key: str) -> Any:
    """The metadata value `key`; `KeyError` if the file has none."""
    return reader.fields[key].contents()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
