"""Shorten other libraries' errors to one sentence."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


def first_sentence(error: Exception) -> str:
    """Return the first sentence of a message: the rest is advice for the other library's callers."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()).partition(". ")[0].rstrip(".") + "."


@contextmanager
def explained(what: str, *kinds: type[Exception]) -> Generator[None]:
    """Turn errors of these kinds into a ValueError that says what went wrong, and why."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{what}: {first_sentence(error)}") from error
