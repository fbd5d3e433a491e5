"""What dispatch knows of a prompt."""

from router.request import PREFIX_TOKENS, prefix_keys


def test_prompts_share_the_keys_of_the_prefix_that_they_share() -> None:
    prompt = list(range(3 * PREFIX_TOKENS + 5))
    other = [*prompt[: 2 * PREFIX_TOKENS], 0, *prompt[2 * PREFIX_TOKENS :]]

    assert len(prefix_keys(prompt)) == 3
    assert prefix_keys(prompt)[:2] == prefix_keys(other)[:2]
    assert prefix_keys(prompt)[2] != prefix_keys(other)[2]
    assert prefix_keys(prompt[: PREFIX_TOKENS - 1]) == ()
