"""Other libraries' errors -> one sentence."""


def first_sentence(error: Exception) -> str:
    """Return the first sentence of a message: what follows in other libraries is advice for their own callers."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".") + "."
