"""Shorten other libraries' errors to one sentence."""


def first_sentence(error: Exception) -> str:
    """Return the first sentence of a message: the rest is advice for the other library's callers."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".") + "."
