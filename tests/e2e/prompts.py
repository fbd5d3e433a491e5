"""Prompts that are the same in every run, without words that mean anything."""

import random


def token_ids(length: int, seed: int = 0) -> list[int]:
    """Printable bytes: a prompt of exactly this many tokens for the tiny model."""
    rng = random.Random(f"{length}/{seed}")
    return [rng.randrange(0x20, 0x7F) for _ in range(length)]
