"""`jd_log.jsonl`: what a run tells of itself while it runs, a line for each log, for `hf-jd report`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

LOG_FILE = "jd_log.jsonl"


class RunLog:
    """The file.

    A line is what Trainer logged, with `max_steps`, and `pairs`, the mean cosines of the groups' rows since the last
    log of training. The first line of a run has `begins`, which is "anew" or "resumed". Nothing is ever taken out of
    the file: a reader leaves out what stands above a new run, and, above a resumed one, the steps that it makes again.
    """

    def __init__(self):
        self._begins: str | None = "anew"

    def begin(self, resumed: bool) -> None:
        """Marks the next line as the first of a run."""
        self._begins = "resumed" if resumed else "anew"

    def write(self, folder: Path, entry: Mapping[str, Any], cosines: Mapping[tuple[str, str], float]) -> None:
        """Adds a line; a line that a kill has cut off is left alone.

        Args:
            folder: Of the file.
            entry: What Trainer logged.
            cosines: Of pairs of groups.
        """
        line = {**entry, **({"begins": self._begins} if self._begins else {}), **_compact(cosines)}
        self._begins = None
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG_FILE).open("ab+") as file:
            if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")


def _compact(cosines: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """The cosines above the diagonal, row by row; None for pairs that weren't in a step together."""
    if not cosines:
        return {}
    names = list(dict.fromkeys(name for pair in cosines for name in pair))
    found = [cosines.get((a, b), cosines.get((b, a))) for a, b in combinations(names, 2)]
    return {"pairs": {"names": names, "cosines": [None if value is None else round(value, 4) for value in found]}}
