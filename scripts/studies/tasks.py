"""Twenty tasks on the beginnings of stories, with answers of one to about fifty tokens."""

from __future__ import annotations

import re
from collections.abc import Callable

Words = list[str]

WORDS = 12
"""The number of a story's words that a task is asked about."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
VOWELS = re.compile("[aeiou]")

TASKS: dict[str, Callable[[Words, str], str]] = {
    "copy": lambda words, rest: " ".join(words),
    "continue": lambda words, rest: rest,
    "upper": lambda words, rest: " ".join(words).upper(),
    "reverse": lambda words, rest: " ".join(words[::-1]),
    "mirror": lambda words, rest: " ".join(words)[::-1],
    "sort": lambda words, rest: " ".join(sorted(words, key=str.lower)),
    "double": lambda words, rest: " ".join(f"{word} {word}" for word in words),
    "skip": lambda words, rest: " ".join(words[::2]),
    "squeeze": lambda words, rest: VOWELS.sub("", " ".join(words)),
    "initials": lambda words, rest: " ".join(word[0] for word in words),
    "lengths": lambda words, rest: " ".join(NUMBERS[min(len(word), 12)] for word in words),
    "spell": lambda words, rest: " ".join(words[-1]),
    "first": lambda words, rest: words[0],
    "last": lambda words, rest: words[-1],
    "longest": lambda words, rest: max(words, key=len),
    "next": lambda words, rest: rest.split()[0],
    "capital": lambda words, rest: next((word for word in words[1:] if word[0].isupper()), "none"),
    "girl": lambda words, rest: "yes" if "girl" in words else "no",
    "once": lambda words, rest: "yes" if words[0] == "Once" else "no",
    "count": lambda words, rest: NUMBERS[sum("e" in word for word in words)],
}
"""Functions that compute each task's answer from the words asked about and the rest of the story."""


def ask(task: str, story: str) -> dict[str, str]:
    """Build an example of a task: `task`, `prompt` and `completion`."""
    words = story.split()
    asked = [re.sub(r"\W", "", word) or word for word in words[:WORDS]]
    answer = TASKS[task](asked, " ".join(words[WORDS:]))
    return {"task": task, "prompt": f"{task}: {' '.join(asked)} =", "completion": f" {answer}"}
