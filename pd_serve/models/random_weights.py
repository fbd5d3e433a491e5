"""Rules of the random models, which make them behave like real ones.

Context decides every token, greedy output is varied and mostly letters, and the end of sequence is rare.
Three choices make that so:

- Weights are uniform: integers of the raw PCG64 stream times one float32 scale. Nothing goes through a
  logarithm or a matrix product, so no library version and no CPU changes a bit of them.
- Query and key weights are large, so a head looks at a few past tokens instead of averaging over all. A wrong
  block of KV cache therefore shows in the text, which is what a test of migration needs.
- The first hidden dimension is a constant that no layer reads or writes. It gives `lm_head` a bias per token,
  which the models lack: bytes that do not print are kept out, letters are preferred, the end is made rare.
"""

import json
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_serve.models import byte_tokenizer

Array = npt.NDArray[np.float32]
Weights = dict[str, Array]

#: Standard deviation of what each matrix gives for an input of unit variance. Tuned by hand: larger query and
#: key gains give more varied text that hangs more on the past, and more float32 noise in the logits. With
#: these the noise is about 7e-6 and the best token is on average 1.1 ahead of the second.
GAIN = {
    "q_proj": 2.25,
    "k_proj": 2.25,
    "v_proj": 1.0,
    "o_proj": 1.5,
    "gate_proj": 1.5,
    "up_proj": 1.5,
    "down_proj": 1.0,
}
_LOGIT_STD = 3.0

#: The last matrices of a layer's parts, whose outputs are hidden states. All others read them, or neither.
WRITERS = ("o_proj", "out_proj", "down_proj", "output_linear")


def uniform(bits: np.random.PCG64, shape: tuple[int, ...], std: float) -> Array:
    """Uniform weights with mean 0 and standard deviation `std`: 24 bits of the stream each, one rounding."""
    raw = bits.random_raw(prod(shape))
    centred = (raw >> np.uint64(40)).astype(np.float32) - np.float32(2**23)
    return (centred * np.float32(std * sqrt(3.0) / 2**23)).reshape(shape)


def embeddings(bits: np.random.PCG64, hidden_size: int, std: float = 1.0) -> Array:
    """A vector for each token, with the same constant in all of them."""
    values = uniform(bits, (byte_tokenizer.VOCAB_SIZE, hidden_size), std)
    values[:, 0] = sqrt(hidden_size) * std
    return values


def output_head(bits: np.random.PCG64, hidden_size: int) -> Array:
    """`lm_head`, which makes the constant a bias for each token."""
    values = uniform(bits, (byte_tokenizer.VOCAB_SIZE, hidden_size), std=_LOGIT_STD / sqrt(hidden_size))
    values[:, 0] = [_LOGIT_STD * bias / sqrt(hidden_size) for bias in byte_tokenizer.LOGIT_BIAS]
    return values


def leave_out_bias(part: str, matrix: Array, outputs: int = 0, inputs: int = 1) -> None:
    """Set to zero what would read or write the first hidden dimension in the matrix of this name.

    Args:
        part: The matrix's name in its layer, such as `q_proj`.
        outputs, inputs: Its axes.
    """
    np.moveaxis(matrix, outputs if part in WRITERS else inputs, 0)[0] = 0.0


def write_tokenizer(directory: Path, max_context_tokens: int) -> None:
    """Write the byte tokenizer, and the ids that begin and end a text, into `directory`."""
    generation = {"bos_token_id": byte_tokenizer.BOS_ID, "eos_token_id": byte_tokenizer.EOS_ID}
    write_json(directory / "generation_config.json", generation | {"pad_token_id": byte_tokenizer.PAD_ID})
    byte_tokenizer.write(directory, max_context_tokens)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as a readable JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
