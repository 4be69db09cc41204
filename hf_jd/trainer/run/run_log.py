"""`jd_log.jsonl`: a run's logs, one per line, for `hf-jd report`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

LOG_FILE = "jd_log.jsonl"


class RunLog:
    """The writer of the log.

    A line has Trainer's logs, `max_steps`, and `pairs`, the mean cosines of the groups' rows since the last log of
    training. The first line of a run has `begins`, either "anew" or "resumed". Lines are never removed: a reader skips
    all lines above a new run, and, above a resumed run, the steps that it repeats.
    """

    def __init__(self):
        self._begins: str | None = "anew"

    def begin(self, resumed: bool) -> None:
        """Mark the next line as the first of a run."""
        self._begins = "resumed" if resumed else "anew"

    def write(self, folder: Path, entry: Mapping[str, Any], cosines: Mapping[tuple[str, str], float]) -> None:
        """Append a line, also after a line that was truncated by a kill.

        Args:
            folder: The file's folder.
            entry: Trainer's logs.
            cosines: The cosines of pairs of groups.
        """
        line = {**entry, **({"begins": self._begins} if self._begins else {}), **_compact(cosines)}
        self._begins = None
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG_FILE).open("ab+") as file:
            if file.seek(0, 2) and (file.seek(-1, 2), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")


def _compact(cosines: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """List the cosines above the diagonal, row by row; None for pairs that shared no step."""
    if not cosines:
        return {}
    names = list(dict.fromkeys(name for pair in cosines for name in pair))
    values = [cosines.get((a, b), cosines.get((b, a))) for a, b in combinations(names, 2)]
    return {"pairs": {"names": names, "cosines": [None if value is None else round(value, 4) for value in values]}}
