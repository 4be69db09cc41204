"""Documents -> their code blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The file's name.
        line: The line where it starts.
        language: The language named after the fence.
        text: The lines between the fences.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def code(self) -> str:
        """The code to run: for a diff, the code after applying it."""
        if self.language != "diff":
            return self.text
        return "".join(line[1:] or "\n" for line in self.text.splitlines(True) if not line.startswith("-"))

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> Iterator[Block]:
    """Yield all blocks in these languages."""
    for page in PAGES:
        text = page.read_text("utf-8")
        for found in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if found[1] in languages:
                yield Block(page.name, text.count("\n", 0, found.start()) + 1, found[1], found[2])


def commands(block: Block) -> Iterator[list[str]]:
    """Yield a shell block's commands, split into words, without comments and `...`."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = [word for word in re.split(r"\s#", line)[0].split() if word != "..."]
        if words and not words[0].startswith("#"):
            yield words
