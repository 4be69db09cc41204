"""The rewards of `compare_rewards.py`: prompts and completions -> one number per completion."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

Reward = Callable[[list[str], list[str]], list[float]]

WORD = "word "
"""Followed by a word: the name of the reward for that word."""

SUM = r"(\d+) \+ (\d+)"
"""A sum in a prompt."""

EQUATION = SUM + r" = \d+"

EMPTY = -10.0
"""The log-probability per token of an empty completion."""


def short(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward short sentences: minus the number of words per sentence."""
    return [-len(text.split()) / max(1, sum(text.count(mark) for mark in ".!?")) for text in completions]


def long(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward long sentences: the number of words per sentence."""
    return [-score for score in short(prompts, completions)]


def dialogue(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward speech."""
    return [float('"' in text) for text in completions]


def narration(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward the absence of speech."""
    return [1 - score for score in dialogue(prompts, completions)]


def variety(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward variety: the share of different words."""
    words = [text.lower().split() for text in completions]
    return [len(set(text)) / max(1, len(text)) for text in words]


def brief(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward short completions: minus the number of words."""
    return [-float(len(text.split())) for text in completions]


def equation(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward an equation."""
    return [float(re.search(EQUATION, text) is not None) for text in completions]


def right(prompts: list[str], completions: list[str]) -> list[float]:
    """Reward a last number that is the sum asked for in the prompt."""
    asked = [re.search(SUM, prompt) for prompt in prompts]
    answers = [re.findall(r"\d+", text)[-1:] for text in completions]
    pairs = zip(asked, answers, strict=True)
    return [float(a is not None and n == [str(int(a[1]) + int(a[2]))]) for a, n in pairs]


def word(which: str) -> Reward:
    """Return the reward for a word."""
    return lambda prompts, completions: [float(which in text.lower()) for text in completions]


WRITTEN = (short, long, brief, dialogue, narration, variety, equation, right)
"""The rewards that depend only on a text, or on a text and its prompt."""


def fluency(model: Any, tokenizer: Any) -> Reward:
    """Return the reward for fluency: the mean log-probability of the tokens under the untrained model."""

    @torch.no_grad()
    def score(prompts: list[str], completions: list[str]) -> list[float]:
        starts = tokenizer(prompts).input_ids
        ends = tokenizer(completions, add_special_tokens=False).input_ids
        rows = [torch.tensor(start + end) for start, end in zip(starts, ends, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, where no earlier token sees it
        logps = model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        scores = zip(logps, starts, ends, strict=True)
        return [row[len(s) - 1 : len(s) + len(e) - 1].mean().item() if e else EMPTY for row, s, e in scores]

    return score


def named(name: str, reward: Reward, scale: float) -> Callable[..., list[float]]:
    """Wrap a reward as TRL calls it, times its scale."""

    def function(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [scale * score for score in reward(prompts, completions)]

    function.__name__ = name
    return function
