"""Tiny random models of every kind of engine, by name: what each has to move beside plain full attention.

A configuration is one that vLLM's CPU build runs. The constraints on the way:

- MLA wants 512 latent dimensions and 64 rotary ones. The rotary embedding is DeepSeek's scaled one: the
  kernel of the plain one turns other rows than those of MLA's keys, so that equal prompts in a batch differ.
- On CPUs with AMX, vLLM takes a kernel for MLA that knows bfloat16 only, unless it is told not to.
- Gated delta net wants heads of 128 dimensions and bfloat16.
- Mamba-2 with a prefix cache ends vLLM's engine at the first prompt longer than a block.

The tiny Llama itself (`tiny`) is fit for two tensor-parallel workers: four heads, two of them with keys.
"""

from dataclasses import dataclass, field
from typing import Any

from pd_serve.models import byte_tokenizer

#: Tokens of a window or chunk: two blocks of the CPU build, so that a request passes several of them.
WINDOW_TOKENS = 64
MAX_CONTEXT_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class ModelKind:
    """A kind of model.

    Attributes:
        groups: Its KV cache groups, in words.
        config: `config.json`.
        engine_arguments: What vLLM has to be told beside the model, as arguments of `AsyncEngineArgs`.
        embedding_std: Standard deviation of the embeddings in `config`'s own scale.
    """

    groups: str
    config: dict[str, Any]
    dtype: str = "float32"
    engine_arguments: dict[str, Any] = field(default_factory=dict)
    embedding_std: float = 1.0


def _config(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    """A configuration with what most kinds share. None leaves an entry out."""
    shared = {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "vocab_size": byte_tokenizer.VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_CONTEXT_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": byte_tokenizer.BOS_ID,
        "eos_token_id": byte_tokenizer.EOS_ID,
        "pad_token_id": byte_tokenizer.PAD_ID,
    }
    return {name: value for name, value in (shared | more).items() if value is not None}


#: Of 4 experts a token goes to 2. Their width differs from the hidden size, so that no axis is mistaken.
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}

_MAMBA_2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}

_MLA = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "moe_layer_freq": 1,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    **_EXPERTS,
}

_NO_PREFIX_CACHE = {"enable_prefix_caching": False}
_MLA_IN_FLOAT32 = {"attention_backend": "CPU_MLA"}

KINDS = {
    "tiny-mistral": ModelKind(
        "sliding window",
        _config("MistralForCausalLM", "mistral", sliding_window=WINDOW_TOKENS),
    ),
    "tiny-gemma3": ModelKind(
        "full attention, two of a sliding window",
        _config(
            "Gemma3ForCausalLM",
            "gemma3_text",
            num_hidden_layers=6,
            sliding_window=WINDOW_TOKENS,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            query_pre_attn_scalar=4,  # instead of large queries and keys, which are normalised here
            hidden_activation="gelu_pytorch_tanh",
            rope_local_base_freq=10000.0,
        ),
        embedding_std=1 / 8,  # the model multiplies embeddings by the root of its hidden size
    ),
    "tiny-gpt-oss": ModelKind(
        "full attention, a sliding window; attention sinks",
        _config(
            "GptOssForCausalLM",
            "gpt_oss",
            intermediate_size=96,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW_TOKENS,
            layer_types=["sliding_attention", "full_attention"] * 2,
            attention_bias=True,
            swiglu_limit=7.0,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        ),
    ),
    "tiny-llama4": ModelKind(
        "full attention, three of chunked local attention",
        _config(
            "Llama4ForCausalLM",
            "llama4_text",
            intermediate_size=96,
            intermediate_size_mlp=128,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=WINDOW_TOKENS,
            no_rope_layers=[1, 0, 1, 1],
            layer_types=["chunked_attention", "full_attention", "chunked_attention", "chunked_attention"],
            interleave_moe_layer_step=1,
            moe_layers=[0, 1, 2, 3],
            use_qk_norm=False,
            attn_temperature_tuning=False,
        ),
    ),
    "tiny-mixtral": ModelKind(
        "full attention; experts",
        _config("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    ),
    "tiny-deepseek-v2": ModelKind(
        "MLA; experts",
        _config(
            "DeepseekV2ForCausalLM",
            "deepseek_v2",
            **_MLA,
            topk_method="greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
        )
        | {"q_lora_rank": None},
        engine_arguments=_MLA_IN_FLOAT32,
    ),
    "tiny-deepseek-v3": ModelKind(
        "MLA; experts",
        _config(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            **_MLA,
            q_lora_rank=64,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
        ),
        engine_arguments=_MLA_IN_FLOAT32,
    ),
    "tiny-mamba2": ModelKind(
        "state of Mamba-2",
        {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "dtype": "float32",
            "vocab_size": byte_tokenizer.VOCAB_SIZE,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "state_size": 16,
            "expand": 2,
            "conv_kernel": 4,
            "num_heads": 4,
            "head_dim": 32,
            "n_groups": 1,
            "chunk_size": 32,
            "use_conv_bias": True,
            "use_bias": False,
            "layer_norm_epsilon": 1e-5,
            "rms_norm": True,
            "tie_word_embeddings": False,
            "bos_token_id": byte_tokenizer.BOS_ID,
            "eos_token_id": byte_tokenizer.EOS_ID,
            "pad_token_id": byte_tokenizer.PAD_ID,
        },
        # Its configuration has no length.
        engine_arguments=_NO_PREFIX_CACHE | {"max_model_len": MAX_CONTEXT_TOKENS},
    ),
    "tiny-falcon-h1": ModelKind(
        "full attention, state of Mamba-2",
        _config(
            "FalconH1ForCausalLM",
            "falcon_h1",
            **_MAMBA_2,
            mamba_d_ssm=128,
            mamba_norm_before_gate=True,
            mamba_rms_norm=False,
            projectors_bias=False,
            key_multiplier=1.0,
            embedding_multiplier=1.0,
            lm_head_multiplier=1.0,
            attention_in_multiplier=1.0,
            attention_out_multiplier=1.0,
            ssm_in_multiplier=1.0,
            ssm_out_multiplier=0.25,  # no norm is there
            mlp_multipliers=[1.0] * 2,
            ssm_multipliers=[1.0] * 5,
        ),
        engine_arguments=_NO_PREFIX_CACHE,
    ),
    "tiny-granite4": ModelKind(
        "full attention, state of Mamba-2; experts",
        _config(
            "GraniteMoeHybridForCausalLM",
            "granitemoehybrid",
            **_MAMBA_2,
            head_dim=None,
            num_attention_heads=2,
            layer_types=["mamba", "attention"] * 2,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=96,
            embedding_multiplier=1.0,
            logits_scaling=1.0,
            residual_multiplier=1.0,
            attention_multiplier=0.125,
            position_embedding_type="rope",
            attention_bias=False,
        ),
        engine_arguments=_NO_PREFIX_CACHE,
    ),
    "tiny-qwen3-next": ModelKind(
        "full attention, three of the state of a gated delta net; experts",
        _config(
            "Qwen3NextForCausalLM",
            "qwen3_next",
            **_EXPERTS,
            dtype="bfloat16",
            num_experts=4,
            shared_expert_intermediate_size=96,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            linear_conv_kernel_dim=4,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=["linear_attention"] * 3 + ["full_attention"],
            full_attention_interval=4,
            partial_rotary_factor=0.25,
            attn_output_gate=True,
        ),
        dtype="bfloat16",
    ),
}
