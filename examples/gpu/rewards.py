"""Rewards for `grpo.yaml`: each takes completions, as texts or messages, and returns a number per completion."""

from __future__ import annotations

from typing import Any


def brief(completions: list[Any], **columns: Any) -> list[float]:
    """Minus the number of words."""
    return [-float(len(text.split())) for text in map(_text, completions)]


def varied(completions: list[Any], **columns: Any) -> list[float]:
    """Reward variety: the share of different words."""
    words = [_text(completion).lower().split() for completion in completions]
    return [len({*of_one}) / len(of_one) if of_one else 0.0 for of_one in words]


def plain(completions: list[Any], **columns: Any) -> list[float]:
    """Minus the mean number of letters per word."""
    words = [_text(completion).split() for completion in completions]
    return [-sum(map(len, of_one)) / len(of_one) if of_one else 0.0 for of_one in words]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]
